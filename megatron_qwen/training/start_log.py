"""What rank 0 logs when an attempt starts: what it runs on, what it reads, and where the log is kept."""

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.reading_plan import plan, warnings
from megatron_qwen.estimate.choices import PresetChoice
from megatron_qwen.log_lines import LogFormatter
from megatron_qwen.models.apex_kernels import foreign_apex_is_here
from megatron_qwen.models.backend import Backend
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.forward import loss_chunk_tokens

log = logging.getLogger(__name__)
_LISTED_SOURCES = 12


def keep_log(path: Path) -> None:
    """Writes the log of this rank to a file as well as to the terminal, and to the file all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(LogFormatter())
    logging.getLogger("megatron_qwen").addHandler(handler)


def log_build(backend: Backend, *, adam: str) -> None:
    """Backend, optimizer and device.

    Args:
        backend: whose kernels compute.
        adam: name of the optimizer's implementation.
    """
    if foreign_apex_is_here():
        log.info("the installed package apex is not NVIDIA apex (PyPI's is another project); it is not used")
    log.info("backend %s (%s); optimizer: %s; device: %s", backend.name, backend.reason, adam, device.device_name())


def log_choices(config: RunConfig, choices: Sequence[PresetChoice], *, card: Path) -> None:
    """The choices of the preset in a line; each with its reason where all is shown.

    Args:
        config: with every choice made.
        choices: of the preset.
        card: file that has them too.
    """
    log.info("performance: the preset chose %d values; %s has the reasons, --verbose shows them", len(choices), card)
    log.debug("performance: output layer and cross-entropy fused, in chunks of %d tokens", loss_chunk_tokens(config))
    for choice in choices:
        log.debug("performance: %s", choice)


def log_data(components: TrainingComponents) -> None:
    """Where in the data the attempt starts, and how often the whole run reads each source."""
    consumed = components.progress.consumed_samples
    reader = components.data.at(consumed)
    tokens = sum(components.data.sources[name].stop for name in reader.stage.weights)
    log.info(
        "data: stage %s starts at sample %s: %s training tokens in %d sources, %d tokens per sample",
        reader.stage.name,
        f"{consumed:,}",
        f"{tokens:,}",
        len(reader.stage.weights),
        reader.seq_length,
    )
    stages = plan(components.data, iteration=components.progress.iteration)
    epochs = {share.name: share.epochs_so_far for stage in stages for share in stage.sources}
    listed = ", ".join(f"{name} {often:.2f}" for name, often in sorted(epochs.items())[:_LISTED_SOURCES])
    log.info(
        "data: epochs of each source over the whole run: %s%s", listed, ", ..." if len(epochs) > _LISTED_SOURCES else ""
    )
    for problem in warnings(components.data, stages):
        log.warning("data: %s", problem)
