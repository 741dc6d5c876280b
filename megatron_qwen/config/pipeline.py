"""How layers are distributed over pipeline ranks and their virtual stages."""

from megatron_qwen.config.sections import ParallelConfig


class StageSplitError(ValueError):
    """The layers cannot be split as asked; the text says why."""


def layers_per_stage(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline rank, first to last: a list of as many counts as there are pipeline ranks.

    Args:
        num_layers: layers of the whole model.
        parallel: pipeline size, virtual stages, and the layers of the first and last rank where they differ.

    Raises:
        StageSplitError: the ranks in between would not get equal shares, or a share is not divisible by the
            number of virtual stages.
    """
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_stages
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if pp == 1:
        if first is not None or last is not None:
            raise StageSplitError("uneven first or last stages require parallel.pipeline_model_parallel_size > 1.")
        return [num_layers]
    given = [size for size in (first, last) if size is not None]
    left, ranks = num_layers - sum(given), pp - len(given)
    if left < 0 or (ranks == 0 and left) or (ranks and (left % ranks or left == 0)):
        between = f"{left} layers on {ranks} pipeline ranks" + (" after the uneven stages" if given else "")
        raise StageSplitError(
            f"{between} do not split evenly; change parallel.pipeline_model_parallel_size or "
            "num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage."
        )
    share = left // ranks if ranks else 0
    stages = [share] * ranks
    stages = ([first] if first is not None else []) + stages + ([last] if last is not None else [])
    if any(stage % vp for stage in stages):
        raise StageSplitError(
            f"stages of {stages} layers do not split into {vp} virtual stages; change "
            "parallel.virtual_pipeline_model_parallel_size."
        )
    return stages
