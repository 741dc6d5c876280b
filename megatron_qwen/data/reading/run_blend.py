"""The blend that a run reads: that of its file, or its single source."""

from pathlib import Path
from typing import Literal

from megatron_qwen.config.blend import Blend, read_blend, single_source
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import DataError, Problem


def packing_of(config: RunConfig) -> Literal["windows", "best_fit"]:
    """How samples are made of data.path."""
    if config.data.packing is not None:
        return config.data.packing
    return "windows" if config.objective.kind == "pretrain" else "best_fit"


def blend_of(config: RunConfig) -> Blend:
    """The blend in data.blend, or a blend of the single source data.path.

    Raises:
        ConfigError: the blend file is wrong.
        DataError: neither is given.
    """
    if config.data.blend is not None:
        return read_blend(Path(config.data.blend))
    if config.data.path is None:
        raise DataError(Problem("data.path", "null", "must name a token file (`mq data prepare` makes one)."))
    return single_source(config.data.path, packing=packing_of(config))
