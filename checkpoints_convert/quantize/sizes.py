"""How large releases are: every format of every dense model of the family, from their shapes alone.

``python -P -m checkpoints_convert.quantize.sizes`` prints the table of docs/quantize.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from checkpoints_convert.conversion import DTYPES
from checkpoints_convert.formats.gguf.plan import choose_types
from checkpoints_convert.formats.gguf.types import KINDS
from checkpoints_convert.formats.registry import FORMATS
from checkpoints_convert.quantize.names import GGUF_KINDS
from checkpoints_convert.quantize.padding import AUTO, padding_of
from checkpoints_convert.quantize.plan import plan_files, weights_in
from checkpoints_convert.quantize.run import dtype_name
from megatron_qwen.checkpoint.read import TensorInfo
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError
from megatron_qwen.hf.mapping import hf_tensors
from megatron_qwen.recipes.registry import RECIPES

MODELS = {
    size.replace("_", ".").upper(): f"qwen2_5_{size}" for size in ("0_5b", "1_5b", "3b", "7b", "14b", "32b", "72b")
}
_PADDED = " (padded)"


@dataclass(frozen=True)
class _Shapes:
    """The tensors of a model without values."""

    tensors: Mapping[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Never asked for: sizes follow from shapes."""
        raise AssertionError(name)


def release_bytes(model: ModelConfig, format_name: str) -> int:
    """Bytes of the weight files of a release.

    Args:
        model: in the shape that is written.
        format_name: as after ``--format``; ``gguf:KIND`` of a kind.

    Raises:
        ConversionError: the format cannot hold a shape.
    """
    if format_name.startswith("gguf:"):
        return sum(item.size for item in choose_types(KINDS[format_name[5:]], model, importances=False))
    format_ = FORMATS[format_name]
    shapes = _Shapes({item.name: TensorInfo(item.shape, torch.bfloat16) for item in hf_tensors(model)})
    dtype = DTYPES[dtype_name(format_.config(model))]
    return sum(file.size for file in plan_files(shapes, model, format_, dtype=dtype))


def table(names: Sequence[str] = tuple(MODELS)) -> list[str]:
    """Markdown: a row for each format, a column for each model, in GB.

    Args:
        names: of the models, in the order of the columns.
    """
    models = {name: RECIPES[MODELS[name]]().model for name in names}
    lines = [f"| GB | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    sizes = [f"{2 * weights_in(model) / 1e9:.2f}" for model in models.values()]
    lines.append(f"| bf16 | {' | '.join(sizes)} |")
    for name in (*FORMATS, *(f"gguf:{kind}" for kind in GGUF_KINDS)):
        lines.append(f"| {name} | {' | '.join(_cell(model, name) for model in models.values())} |")
    return lines


def _cell(model: ModelConfig, name: str) -> str:
    try:
        return f"{release_bytes(model, name) / 1e9:.2f}"
    except ConversionError:
        padded = padding_of(AUTO, model).model(model)
    try:
        return f"{release_bytes(padded, name) / 1e9:.2f}{_PADDED}"
    except ConversionError:
        return "-"


if __name__ == "__main__":
    print("\n".join(table()))
