"""How many ranks a layout takes."""

from megatron_qwen.config.run import RunConfig


def smallest_world(config: RunConfig) -> int:
    """Fewest ranks that hold the model: the layout's size and, with experts, a multiple of both grids."""
    parallel, dense = config.parallel, config.parallel.model_parallel_size
    if not config.model.is_moe:
        return dense
    expert = parallel.expert_tensor_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    return next(size for size in range(dense, dense * expert + 1, dense) if size % expert == 0)
