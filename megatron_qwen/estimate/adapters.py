"""What LoRA changes in the estimates: what is trained, what the backward pass keeps, and the products of adapters."""

from collections.abc import Iterator

from megatron_qwen.config.lora import EMBEDDING, LoraTarget, targets
from megatron_qwen.config.pipeline import layers_per_stage
from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.parameters import count_parameters

_ROW_PARALLEL = ("o_proj", "down_proj")


def adapters_per_rank(config: RunConfig, *, stage: int) -> tuple[int, int]:
    """Scalars of adapters on a rank of a pipeline stage: beside dense weights, and beside routed experts."""
    lora, parallel, model = config.lora, config.parallel, config.model
    tp = parallel.tensor_model_parallel_size
    stages = layers_per_stage(model.num_layers, parallel)
    dense = experts = 0
    for target in targets(lora, model):
        if target.per_expert:
            local = (model.num_moe_experts or 0) // parallel.expert_model_parallel_size
            experts += stages[stage] * local * sum(_sizes(target, config, tp=1))
        elif target.per_layer:
            dense += stages[stage] * sum(_sizes(target, config, tp=tp))
        elif stage == (0 if target.name == EMBEDDING else len(stages) - 1):
            dense += (lora.rank or 0) * (target.inputs + padded_rows(config) // tp)
    return dense, experts


def padded_rows(config: RunConfig) -> int:
    """Rows of the vocabulary's matrices, with padding."""
    multiple = 128 * config.parallel.tensor_model_parallel_size  # models/vocabulary.py, which imports no estimate
    return -(-config.model.vocab_size // multiple) * multiple


def trained_per_rank(config: RunConfig, dense_and_experts: tuple[int, int], *, stage: int) -> tuple[int, int]:
    """Scalars that a rank trains.

    Args:
        config: the run.
        dense_and_experts: what it holds without adapters, which it trains without LoRA.
        stage: its pipeline stage.
    """
    if config.lora.rank is None:
        return dense_and_experts
    dense, experts = adapters_per_rank(config, stage=stage)
    return dense + _saved_per_rank(config, stage=stage), experts


def trained_parameters(config: RunConfig) -> int | None:
    """Scalars of the whole model that LoRA trains; None without LoRA."""
    lora, model = config.lora, config.model
    if lora.rank is None:
        return None
    total = len(lora.modules_to_save) * model.vocab_size * model.hidden_size
    for target in targets(lora, model):
        copies = (model.num_layers if target.per_layer else 1) * (
            model.num_moe_experts or 1 if target.per_expert else 1
        )
        total += copies * lora.rank * (target.inputs + target.outputs)
    return total


def described(config: RunConfig) -> str | None:
    """What a run with LoRA trains, for people; None without LoRA."""
    trained = trained_parameters(config)
    if trained is None:
        return None
    names = [target.name for target in targets(config.lora, config.model)]
    whole = f", and {', '.join(config.lora.modules_to_save)} whole" if config.lora.modules_to_save else ""
    total = count_parameters(config.model).total
    return (
        f"LoRA of rank {config.lora.rank} on {', '.join(names)}{whole}: trains {trained:,} parameters "
        f"beside {total:,} ({trained / total:.2%})"
    )


def trains_output(config: RunConfig) -> bool:
    """Whether the loss computes a gradient of the output matrix."""
    lora, tied = config.lora, config.model.share_embeddings_and_output_weights
    whole = (EMBEDDING if tied else "lm_head") in lora.modules_to_save
    return lora.rank is None or whole or any(target.name == "lm_head" for target in targets(lora, config.model))


def adapted_parts(config: RunConfig) -> dict[str, list[LoraTarget]]:
    """The layers with an adapter by the input that they share: ``qkv``, ``proj``, ``fc1``, ``fc2``, dense or routed."""
    found: dict[str, list[LoraTarget]] = {"qkv": [], "proj": [], "fc1": [], "fc2": []}
    for target in targets(config.lora, config.model):
        last = target.name.rsplit(".", 1)[-1]
        inputs = {"o_proj": "proj", "gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2"}.get(last, "qkv")
        if target.per_layer:
            found[inputs].append(target)
    return found


def adapts_experts(config: RunConfig) -> bool:
    """Whether routed experts have adapters."""
    return any(target.per_expert for target in targets(config.lora, config.model))


def products(config: RunConfig) -> Iterator[tuple[LoraTarget, float, float]]:
    """The adapters of a layer on a rank: which, features in, features out; those of experts once."""
    tp = config.parallel.tensor_model_parallel_size
    for target in targets(config.lora, config.model):
        if target.per_layer:
            split = 1 if target.per_expert else tp
            row = target.name.endswith(_ROW_PARALLEL)
            yield target, target.inputs / (split if row else 1), target.outputs / (1 if row else split)


def _sizes(target: LoraTarget, config: RunConfig, *, tp: int) -> tuple[int, int]:
    """Scalars of lora_A and lora_B on one of ``tp`` ranks."""
    rank = config.lora.rank or 0
    row = target.name.endswith(_ROW_PARALLEL)
    return rank * target.inputs // (tp if row else 1), rank * target.outputs // (1 if row else tp)


def _saved_per_rank(config: RunConfig, *, stage: int) -> int:
    """Scalars of vocabulary matrices that are trained whole; tied ones are on the first and the last stage."""
    model, saved = config.model, config.lora.modules_to_save
    last = config.parallel.pipeline_model_parallel_size - 1
    one = padded_rows(config) // config.parallel.tensor_model_parallel_size * model.hidden_size
    if model.share_embeddings_and_output_weights:
        return one if EMBEDDING in saved and stage in (0, last) else 0
    return one * ((EMBEDDING in saved and stage == 0) + ("lm_head" in saved and stage == last))
