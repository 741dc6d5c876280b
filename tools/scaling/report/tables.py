"""The tables of a report, as HTML."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from tools.scaling.fit_file import coefficient
from tools.scaling.observations import DIVERGED, FAILED, STATUSES, Observation
from tools.scaling.report.content import Content, counted

_HEADS = ("cell", "status", "N", "D", "FLOPs", "learning rate", "batch", "loss", "why")


def cells(content: Content) -> str:
    """All cells, sortable by column, with links to their runs."""
    rows = "".join(_cell(one, content) for one in content.results.observations)
    heads = "".join(
        f'<th{_right(1 < index < 8)}><button type="button">{name}</button></th>' for index, name in enumerate(_HEADS)
    )
    options = "".join(f"<option>{status}</option>" for status in STATUSES)
    return (
        '<div class="tools"><label>Find <input id="filter" type="search"></label>'
        f'<label>Status <select id="status"><option value="">all</option>{options}</select></label>'
        f'<span id="shown" class="note">{len(content.results.observations)}</span></div>'
        f'<div class="scroll"><table id="cells" class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(one: Observation, content: Content) -> str:
    name = html.escape(one.name or "-")
    if link := content.links.get(one.name):
        name = f'<a href="{html.escape(link)}">{name}</a>'
    params = counted(one, embeddings=content.embeddings)
    numbers = (
        (params, ".4g"),
        (one.tokens, ".4g"),
        (6 * params * one.tokens, ".3g"),
        (one.learning_rate, ".3g"),
        (one.batch_tokens, ".6g"),
        (None if math.isnan(one.loss) else one.loss, ".4f"),
    )
    return (
        f'<tr data-status="{one.status}"><td>{name}</td><td class="status-{one.status}">{one.status}</td>'
        + "".join(_number(value, form) for value, form in numbers)
        + f'<td class="wide">{html.escape(content.results.reasons.get(one.name, ""))}</td></tr>'
    )


def _number(value: float | None, form: str) -> str:
    if value is None:
        return '<td class="number" data-value="">-</td>'
    return f'<td class="number" data-value="{value:.10g}">{value:{form}}</td>'


def _right(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: bool = True) -> str:
    """A plain table; numbers to the right."""
    head = "".join(f"<th{_right(numeric and index > 0)}>{html.escape(name)}</th>" for index, name in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(f"<td{_right(numeric and index > 0)}>{html.escape(str(cell))}</td>" for index, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def coefficients(document: dict[str, Any]) -> str:
    """Of the loss, with intervals."""
    found = [coefficient(name, value) for name, value in document["surface"]["coefficients"].items()]
    rows = [(name, f"{value:.5g}", f"{low:.5g} to {high:.5g}") for name, value, low, high in found]
    return table(("coefficient", "value", "90 % interval"), rows)


def on_par(document: dict[str, Any]) -> str:
    """MoE models and their dense equals."""
    rows = [
        (
            f"{one['sparsity']:.3g}",
            f"{one['granularity']:.3g}",
            f"{one['factor']:.2f}",
            f"{one['low']:.2f} to {one['high']:.2f}",
        )
        for one in document["on_par"]
    ]
    return table(("all over active parameters", "granularity", "dense equal over active", "90 % interval"), rows)


def left_out(document: dict[str, Any]) -> str:
    """The largest size as predicted from the smaller ones."""
    headline = document["headline"]
    rows = [
        (f"{tokens:.4g}", f"{measured:.4f}", f"{predicted:.4f}", f"{100 * (predicted / measured - 1):+.2f} %")
        for tokens, measured, predicted in zip(
            headline["tokens"], headline["measured"], headline["predicted"], strict=True
        )
    ]
    return table((f"D at N = {headline['params']:.4g}", "measured", "predicted", "off by"), rows)


def optima(document: dict[str, Any]) -> str:
    """The best settings of every model and horizon, with what stands against them."""
    points = document["points"]
    rows = []
    for one in document["optima"]:
        group = one["group"]
        rows.append(
            (
                one["variable"].replace("_", " "),
                f"{points['params'][group]:.4g}",
                f"{points['tokens'][group]:.4g}",
                "-" if one["value"] is None else f"{one['value']:.3g}",
                "-" if one["low"] is None else f"{one['low']:.3g} to {one['high']:.3g}",
                ", ".join(one["flags"]),
            )
        )
    return table(("setting", "N", "D", "best", "90 % interval", "flags"), rows)


def budget(content: Content) -> str:
    """Device-hours by model."""
    rows = [(one.model, one.runs, f"{one.planned:.3g}", f"{one.spent:.3g}") for one in content.results.spent]
    total = (
        "all",
        sum(one.runs for one in content.results.spent),
        f"{sum(one.planned for one in content.results.spent):.3g}",
        f"{sum(one.spent for one in content.results.spent):.3g}",
    )
    return table(("model", "runs", "device-hours planned", "spent"), [*rows, total])


def lost(content: Content) -> str:
    """What diverged, failed or was left out, and why."""
    rows = [
        (one.name or f"N {one.params:.3g}, D {one.tokens:.3g}", one.status, content.results.reasons.get(one.name, ""))
        for one in content.results.observations
        if one.status in (DIVERGED, FAILED)
    ]
    rows += [
        (str(one["what"]), f"dropped, {one['cells']} cells", str(one["reason"])) for one in content.results.dropped
    ]
    return table(("what", "how", "why"), rows, numeric=False) if rows else ""
