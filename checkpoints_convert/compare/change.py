"""``mq convert diff``: how far the weights moved between two checkpoints of one run, by layer and part."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.compare.sides import Side
from checkpoints_convert.progress import ByteProgress
from checkpoints_convert.tensor_set import TensorSet, blocks
from megatron_qwen.errors import ConversionError, Problem

# By what a name holds, its column; the first that fits.
_COLUMNS = (
    ("q_proj", "Q"),
    ("k_proj", "K"),
    ("v_proj", "V"),
    ("o_proj", "O"),
    ("norm", "norms"),
    ("mlp.gate.", "router"),
    ("shared_expert", "shared expert"),
    (".experts.", "experts"),
    ("gate_proj", "gate"),
    ("up_proj", "up"),
    ("down_proj", "down"),
)


_ANNOTATED_LAYERS, _DECADE = 12, 10.0


@dataclass(frozen=True)
class Change:
    """How a group of tensors moved.

    Args:
        layer: its layer, or ``embedding``, ``output``, ``final norm``.
        part: its column.
        norm: of the first checkpoint's tensors together.
        change: norm of the difference.
    """

    layer: str
    part: str
    norm: float
    change: float

    @property
    def relative(self) -> float:
        """Change in units of the norm."""
        return self.change / self.norm if self.norm else math.inf if self.change else 0.0


def measure(a: Side, b: Side, *, workers: int = 2, quiet: bool = False) -> list[Change]:
    """The change from ``a`` to ``b`` by layer and part.

    Raises:
        ConversionError: they do not hold the same tensors.
    """
    ours, theirs = a.tensors, b.tensors
    if ours is None or theirs is None:
        raise ConversionError(Problem("diff", None, "requires weights on both sides; a manifest has none."))
    shapes = [{name: info.shape for name, info in side.tensors.items()} for side in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ConversionError(Problem(str(b.path), None, f"is not a checkpoint of the same model as {a.path}."))
    sizes = {name: torch.Size(info.shape).numel() * info.dtype.itemsize for name, info in ours.tensors.items()}
    progress = ByteProgress(sum(sizes.values()), quiet=quiet)
    sums: dict[tuple[str, str], list[float]] = {}

    def one(name: str) -> tuple[str, float, float]:
        squares = _squares(ours, theirs, name)
        progress.add(sizes[name])
        return name, *squares

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="diff") as pool:
            for name, norm, change in pool.map(one, ours.tensors):
                total = sums.setdefault(_cell(name), [0.0, 0.0])
                total[0] += norm
                total[1] += change
    finally:
        progress.close()
    return [Change(*cell, math.sqrt(norm), math.sqrt(change)) for cell, (norm, change) in sums.items()]


def _squares(a: TensorSet, b: TensorSet, name: str) -> tuple[float, float]:
    norm = change = 0.0
    for ours, theirs in blocks([a, b], name):
        one, other = ours.float(), theirs.float()
        norm += float(one.square().sum(dtype=torch.float64))
        change += float((other - one).square().sum(dtype=torch.float64))
    return norm, change


def _cell(name: str) -> tuple[str, str]:
    ends = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "output", "model.norm.weight": "final norm"}
    if name in ends:
        return ends[name], "all"
    return name.split(".")[2], next((column for mark, column in _COLUMNS if mark in name), "other")


def table(changes: list[Change]) -> str:
    """Relative change by layer (rows) and part (columns), in percent."""
    layers, columns = _axes(changes)
    cells = {(item.layer, item.part): f"{100 * item.relative:.3g} %" for item in changes}
    width = max([len("layer"), *map(len, layers)])
    lines = [f"{'layer':<{width}}" + "".join(f"{column:>15}" for column in columns)]
    lines += [
        f"{layer:<{width}}" + "".join(f"{cells.get((layer, column), ''):>15}" for column in columns) for layer in layers
    ]
    ends = [item for item in changes if item.part == "all"]
    return "\n".join([*lines, "", *(f"{item.layer:<{width}}{100 * item.relative:>14.3g} %" for item in ends)])


def draw(changes: list[Change], path: Path, *, title: str) -> None:
    """A map of the relative change, layers over parts, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, NullFormatter

    layers, columns = _axes(changes)
    values = np.full((len(layers), len(columns)), np.nan)
    for item in changes:
        if item.part != "all" and item.relative > 0:
            values[layers.index(item.layer), columns.index(item.part)] = 100 * item.relative
    size = (1.6 + 0.8 * len(columns), max(3.2, 1.8 + 0.22 * len(layers)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    norm = LogNorm() if np.isfinite(values).any() else None
    image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    step = max(1, len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    if norm is not None:
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        bar = figure.colorbar(image, label="change, % of the norm")
        bar.ax.yaxis.set_major_formatter(plain)
        within_a_decade = np.nanmax(values) / np.nanmin(values) <= _DECADE
        bar.ax.yaxis.set_minor_formatter(plain if within_a_decade else NullFormatter())
        bar.ax.tick_params(which="both", labelsize=8)
    if len(layers) <= _ANNOTATED_LAYERS and norm is not None:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = norm(value) < 0.5
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
    ends = "   ".join(f"{item.layer}: {100 * item.relative:.3g} %" for item in changes if item.part == "all")
    axes.set_xlabel(ends, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _axes(changes: list[Change]) -> tuple[list[str], list[str]]:
    layers = list(dict.fromkeys(item.layer for item in changes if item.part != "all"))
    order = [column for _, column in _COLUMNS] + ["other"]
    present = {item.part for item in changes}
    return layers, [column for column in dict.fromkeys(order) if column in present]


def as_json(changes: list[Change]) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [{**vars(item), "relative": item.relative} for item in changes]
