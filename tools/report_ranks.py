"""Ranks in the course of a run as a part of ``mq report``: a heat map of their speed, and the slow ones by name."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.run_records import read_lines

# Rows of the map; of more ranks several share a row, which shows the slowest of them.
_ROWS = 128
_NAMED = 20
# A rank at half of its peers' speed and below has the darkest colour, which no rank of a healthy run comes near to.
_DARKEST = 0.5


@dataclass(frozen=True)
class RankHistory:
    """What stragglers.jsonl tells of the run's latest layout.

    Args:
        iterations: the last step of each line.
        scores: for each line the score of every rank, nan where it is not known.
        nodes: of every rank, at the end.
    """

    iterations: list[int]
    scores: list[list[float]]
    nodes: list[str]


def read_history(path: Path) -> RankHistory | None:
    """stragglers.jsonl; None where there is none, or nothing in it.

    Lines of another number of ranks, before a change of the layout, are left out.
    """
    lines = read_lines(path)
    nodes: list[Any] = next((line["nodes"] for line in reversed(lines) if isinstance(line.get("nodes"), list)), [])
    windows = [line for line in lines if isinstance(line.get("score"), list) and len(line["score"]) == len(nodes)]
    if not windows:
        return None
    scores = [[math.nan if one is None else float(one) for one in line["score"]] for line in windows]
    return RankHistory([int(line["iteration"]) for line in windows], scores, [str(node) for node in nodes])


def ranks_html(history: RankHistory, records: Sequence[dict[str, Any]], figure: str) -> str:
    """The section: what the map shows, the map, and the ranks that were named.

    Args:
        history: of the ranks.
        records: of metrics.jsonl.
        figure: the map, as SVG.
    """
    told = (
        "The colour is a rank's speed as a share of its peers': the time that they need for a step by themselves, over "
        "what it needs. Waits for other ranks do not count."
    )
    per_row = _ranks_of_a_row(len(history.nodes))
    if per_row > 1:
        told += f" A row is {per_row} ranks and shows the slowest of them."
    return f"<p>{told}</p><figure>{figure}</figure>{_named_table(records)}"


def draw(history: RankHistory, figure: Any, axis: Any) -> None:
    """Draws the map, rank x time.

    Args:
        history: of the ranks.
        figure: of matplotlib.
        axis: of the figure.
    """
    rows = _rows(history)
    height = len(rows)
    mesh = axis.pcolormesh(
        _edges(history.iterations), range(height + 1), rows, cmap=_colours(), vmin=_DARKEST, vmax=1.0, rasterized=True
    )
    axis.grid(visible=False)
    axis.invert_yaxis()
    axis.set(xlabel="step", ylabel="rank")
    axis.xaxis.get_major_locator().set_params(integer=True)
    per_row = _ranks_of_a_row(len(history.nodes))
    ticks = list(range(0, height, max(1, height // 16)))
    nodes = [history.nodes[tick * per_row] for tick in ticks]
    several = len(set(history.nodes)) > 1
    labels = [
        f"{tick * per_row} {node}" if several else str(tick * per_row) for tick, node in zip(ticks, nodes, strict=True)
    ]
    axis.set_yticks([tick + 0.5 for tick in ticks], labels)
    figure.colorbar(mesh, ax=axis, label="speed, of its peers'", extend="min", pad=0.02)


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = ["#8c1d0b", "#c2452d", "#efb9a4", "#f3f1ea"]
    return LinearSegmentedColormap.from_list("speed", colours, bad="#dfe3e8")


def _edges(iterations: Sequence[int]) -> list[int]:
    """The borders of the columns: each ends with its last step."""
    first = iterations[0] - (iterations[1] - iterations[0] if len(iterations) > 1 else iterations[0])
    return [max(first, 0), *iterations]


def _ranks_of_a_row(ranks: int) -> int:
    return math.ceil(ranks / _ROWS)


def _rows(history: RankHistory) -> list[list[float]]:
    """[rows, lines]: the lowest score of each row's ranks."""
    size = _ranks_of_a_row(len(history.nodes))
    ranks = list(zip(*history.scores, strict=True))

    def lowest(several: Sequence[Sequence[float]]) -> list[float]:
        columns = ([one for one in column if not math.isnan(one)] for column in zip(*several, strict=True))
        return [min(column) if column else math.nan for column in columns]

    return [lowest(ranks[begin : begin + size]) for begin in range(0, len(ranks), size)]


def _named_table(records: Sequence[dict[str, Any]]) -> str:
    """Every rank that was named: when, how slow at worst, and why."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for record in records:
        for one in record.get("stragglers") or ():
            if not isinstance(one, dict) or not isinstance(one.get("score"), int | float):
                continue
            seen = found.setdefault(
                (one.get("rank", -1), str(one.get("node"))),
                {"from": record["iteration"], "score": math.inf, "cause": str(one.get("cause"))},
            )
            seen["to"], seen["score"] = record["iteration"], min(seen["score"], one["score"])
    if not found:
        return "<p>No rank was slow for long.</p>"
    worst = sorted(found.items(), key=lambda item: item[1]["score"])[:_NAMED]
    rows = "".join(
        f"<tr><td>{rank}</td><td>{html.escape(node)}</td><td>{seen['from']} to {seen['to']}</td>"
        f"<td>{seen['score']:.2f}</td><td>{html.escape(seen['cause'])}</td></tr>"
        for (rank, node), seen in worst
    )
    heads = "".join(f"<th>{name}</th>" for name in ("slow rank", "node", "steps", "lowest speed", "cause"))
    left = f"<p>and {len(found) - _NAMED} more</p>" if len(found) > _NAMED else ""
    return f"<table><tr>{heads}</tr>{rows}</table>{left}"
