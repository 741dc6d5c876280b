"""Scores of a run in tasks, for its page: a figure of those that the configuration names, and a table of all."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

_TASK, _SOURCE = "eval/", "validation_bits_per_byte/"
# The first that a task has is drawn.
_SHARES = ("acc_norm", "acc", "exact_match", "f1", "mcc")
_BITS = ("gold_bits_per_byte", "bits_per_byte")
_COLOURS = ("#1f4e8c", "#c2452d", "#5a9a8b", "#d8a13a", "#7a5ea8", "#3f7f72", "#8fa3bf", "#8c5a1f")
Points = list[tuple[float, float]]


def scores_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Values of every score by its name without a prefix (``arc_easy/acc``), over million tokens."""
    found: dict[str, Points] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(_TASK) and isinstance(value, int | float):
                found.setdefault(name.removeprefix(_TASK), []).append((record["consumed_tokens"] / 1e6, value))
    return found


def source_bits(records: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Validation loss of every source in bits per byte, over million tokens."""
    found: dict[str, Points] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(_SOURCE) and value is not None:
                found.setdefault(name.removeprefix(_SOURCE), []).append((record["consumed_tokens"] / 1e6, value))
    return found


def draw(
    scores: Mapping[str, Points], sources: Mapping[str, Points], tasks: Sequence[str], axes: Sequence[Any]
) -> None:
    """Two panels: shares of right answers, and bits per byte.

    Args:
        scores: of ``scores_of``.
        sources: of ``source_bits``.
        tasks: that are drawn.
        axes: left and right.
    """
    left, right = axes
    for number, task in enumerate(tasks):
        colour = _COLOURS[number % len(_COLOURS)]
        for axis, metrics in ((left, _SHARES), (right, _BITS)):
            metric = next((one for one in metrics if f"{task}/{one}" in scores), None)
            if metric is not None:
                _line(axis, scores[f"{task}/{metric}"], colour, f"{task} ({metric})", style="-")
    for number, (source, points) in enumerate(sources.items()):
        _line(right, points, _COLOURS[-1 - number % len(_COLOURS)], f"text of {source}", style="--")
    left.set(title="share of right answers", xlabel="million tokens")
    right.set(title="bits per byte: right answers, held-out text", xlabel="million tokens")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
        else:
            axis.set_visible(False)


def _line(axis: Any, points: Points, colour: str, label: str, *, style: str) -> None:
    axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, linewidth=1.3, label=label)


def table(scores: Mapping[str, Points]) -> str:
    """The last value of every score, and the first."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{points[0][1]:.4f}</td><td>{points[-1][1]:.4f}</td></tr>"
        for name, points in sorted(scores.items())
    )
    return f"<table><tr><th>score</th><th>first</th><th>last</th></tr>{rows}</table>" if rows else ""
