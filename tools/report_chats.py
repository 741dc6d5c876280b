"""Fine-tuning of a run, for its page: loss by who wrote the tokens, where answers end, how full the rows are."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

_LOSS = "validation_loss/"
_COLOURS = ("#1f4e8c", "#c2452d", "#5a9a8b", "#d8a13a", "#7a5ea8", "#3f7f72")
_SHARES = {
    "end_probability": ("end of a turn where one ends, training", "#8fa3bf"),
    "validation_end_probability": ("the same, held out", "#1f4e8c"),
    "trained_fraction": ("tokens that carry loss", "#d8a13a"),
}
Points = list[tuple[float, float]]


def is_fine_tuning(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the records are of conversations."""
    return any("trained_fraction" in record for record in records)


def filled(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the rows' positions that held tokens, over all records; None where they do not say it."""
    known = [record for record in records if record.get("seq_length") and record.get("consumed_samples")]
    if len(known) < 2:
        return None
    pairs = list(itertools.pairwise(known))
    tokens = sum(b["consumed_tokens"] - a["consumed_tokens"] for a, b in pairs)
    room = sum((b["consumed_samples"] - a["consumed_samples"]) * b["seq_length"] for a, b in pairs)
    return tokens / room if room > 0 else None


def draw(records: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    """Two panels: held-out loss by source and by who wrote, and shares.

    Args:
        records: of metrics.jsonl.
        axes: left and right.
    """
    left, right = axes
    losses = _by_name(records, _LOSS)
    sources = sorted({name.rpartition("/")[0] for name in losses})
    for name, points in sorted(losses.items()):
        style = "--" if name.endswith("/prompt") else "-"
        colour = _COLOURS[sources.index(name.rpartition("/")[0]) % len(_COLOURS)]
        left.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, linewidth=1.3, label=name)
    for name, (label, colour) in _SHARES.items():
        points = [(record["consumed_tokens"] / 1e6, record[name]) for record in records if record.get(name) is not None]
        if points:
            marker = "o" if name.startswith("validation") else None
            right.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=3, linewidth=1.2, label=label
            )
    left.set(title="held-out loss, nats per token", xlabel="million tokens")
    right.set(title="shares and probabilities", xlabel="million tokens", ylim=(0, 1.02))
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
        else:
            axis.set_visible(False)


def _by_name(records: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(prefix) and value is not None:
                found.setdefault(name.removeprefix(prefix), []).append((record["consumed_tokens"] / 1e6, value))
    return found
