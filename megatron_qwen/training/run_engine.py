"""The engine over the modules of a run, for tasks whose answers are written while it trains."""

from pathlib import Path

from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.inference.announcements import Announcements
from megatron_qwen.inference.blocks import blocks_of
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.loading import inference_config
from megatron_qwen.inference.scheduler import Limits
from megatron_qwen.inference.stage import Stage
from megatron_qwen.inference.together import Together
from megatron_qwen.training.components import TrainingComponents

_SEQUENCES = 16  # at a time: their keys and values lie beside the state of training


def cannot_write(components: TrainingComponents) -> str | None:
    """Why the engine does not work on the modules of a run; None where it does."""
    parallel = components.config.parallel
    if components.backend.name != "torch":
        return f"the {components.backend.name} backend"
    if components.config.lora.rank is not None:
        return "LoRA, whose adapters it does not know before they are merged"
    if parallel.virtual_stages > 1:
        return "virtual pipeline stages"
    if parallel.context_parallel_size > 1:
        return "context parallelism"
    return None


def engine_of(components: TrainingComponents, tokenizer: Path, meeting: Announcements) -> Together:
    """The engine of this rank, with the weights as they are; its cache is freed with it.

    Args:
        components: of the run, whose parameters are whole (``Model.whole_parameters``).
        tokenizer: directory, for stop strings.
        meeting: of the run's ranks.
    """
    config, longest = components.config, components.config.data.seq_length
    stage = Stage(
        components.model.modules[0], inference_config(config), components.groups, longest=longest, copy_bytes=0
    )
    blocks = config.parallel.pipeline_model_parallel_size * _SEQUENCES * blocks_of(longest)
    decode = load_tokenizer(tokenizer).decode
    return Together(Engine(stage, blocks=blocks, limits=Limits(sequences=_SEQUENCES), decode=decode), meeting)
