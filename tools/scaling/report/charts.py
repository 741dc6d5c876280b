"""The charts of a report, as Vega-Lite: each a question that a reader of scaling laws asks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.scaling import compute_optimal
from tools.scaling.fit import Fit, same_models
from tools.scaling.observations import DONE, Observation
from tools.scaling.report.encodings import (
    POINT_TOOLTIP,
    RAMP,
    ZOOM,
    cell_row,
    cell_tooltip,
    colour_by,
    layered,
    logarithmic,
    loss_axis,
    number,
    plain,
    point_rows,
    rows_of,
    short,
)
from tools.scaling.surface import HIGH, LOW, Points, Surface

_STRONG, _FAINT = "#e8590c", "#868e96"
_NAMES = {"learning_rate": "learning rate", "batch_tokens": "batch in tokens"}
# How far beyond the largest compute the law is drawn.
_BEYOND = 3.0
# Horizons for which a law of the settings is drawn.
_LINES = 4
# Losses are shown up to so many times that of the worst model's best cell: a cell that blew up would flatten the rest.
_SHOWN = 1.12


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        name: of its files.
        title: above it.
        caption: what it shows and how to read it.
        spec: Vega-Lite.
    """

    name: str
    title: str
    caption: str
    spec: dict[str, Any]


def charts(observations: Sequence[Observation], fit: Fit | None) -> list[Chart]:
    """Those that the data allow."""
    done = [one for one in observations if one.status == DONE]
    found = [loss_over_compute(done, fit)] if done else []
    if fit is None:
        return found
    if fit.profiles:
        found.append(isoflops(fit))
    if fit.allocations:
        found.append(allocation(fit))
    for variable in fit.variables:
        found.append(basin(done, fit, variable))
        if any(one.variable == variable and one.value is not None for one in fit.optima):
            found.append(optima(fit, variable))
    if fit.surface is not None:
        found.append(residuals(fit, fit.surface))
    return found


def loss_over_compute(done: Sequence[Observation], fit: Fit | None) -> Chart:
    """Every cell, the envelope, and the law at its best size."""
    embedded = fit is not None and fit.settings.embeddings
    rows = [cell_row(one, embeddings=embedded) for one in done]
    tooltip = cell_tooltip(rows)
    color = colour_by("params", "N", (row["params"] for row in rows))
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": rows},
            "params": [ZOOM],
            "mark": {"type": "point", "filled": True, "size": 36, "opacity": 0.55},
            "encoding": {"color": color, "tooltip": tooltip},
        }
    ]
    caption = "Every finished cell at its compute, 6 N D"
    lowest, highest = _losses([one.loss for one in done], fit)
    if fit is not None:
        order = compute_optimal.envelope(fit.points)
        kept = fit.points.only(order)
        caption += "; the thick line joins the models that no other beats with less compute"
        layers.append(
            {
                "data": {"values": point_rows(kept)},
                "mark": {"type": "line", "color": _STRONG, "strokeWidth": 2.5, "point": {"color": _STRONG, "size": 40}},
                "encoding": {"tooltip": POINT_TOOLTIP},
            }
        )
        frontier = _frontier(fit)
        if frontier:
            dense = " of dense models" if fit.points.has_moe else ""
            caption += f"; the dashed one is the law{dense} at the best size for each compute, with its 90 % interval"
            layers += [
                {
                    "data": {"values": frontier},
                    "mark": {"type": "area", "color": _FAINT, "opacity": 0.25},
                    "encoding": {"y": loss_axis("low"), "y2": {"field": "high"}},
                },
                {
                    "data": {"values": frontier},
                    "mark": {"type": "line", "color": _FAINT, "strokeDash": [6, 4]},
                    "encoding": {
                        "tooltip": [number("flops", "C"), number("params", "best N"), number("loss", "loss", ".4f")]
                    },
                },
            ]
        lows = [row["low"] for row in frontier if row["low"] is not None and row["low"] > 0]
        lowest = min(lowest, *lows) if lows else lowest
    encoding = {"x": logarithmic("flops", "compute, FLOPs"), "y": loss_axis("loss", highest, lowest)}
    caption += _beyond(sum(one.loss > highest for one in done))
    return Chart("loss_over_compute", "Loss over compute", caption + ".", layered(layers, encoding))


def _losses(losses: Sequence[float], fit: Fit | None) -> tuple[float, float]:
    """What is shown of them at first, a hair more than they are."""
    highest = max(losses)
    if fit is not None:
        highest = min(highest, _SHOWN * float(np.exp(fit.points.log_loss.max())))
    return min(losses) * (1 - 1e-6), highest * (1 + 1e-6)


def _beyond(count: int) -> str:
    return f"; {count} cells lie above, zoom out to see them" if count else ""


def _frontier(fit: Fit) -> list[dict[str, float]]:
    """The law along the best dense sizes, from the smallest measured compute to a few times the largest."""
    chosen = [one for one in fit.allocations if one.approach == "surface"]
    if fit.surface is None or not chosen:
        return []
    compute = 6 * fit.points.params * fit.points.tokens
    flops = np.exp(np.linspace(np.log(compute.min()), np.log(compute.max() * _BEYOND), 40))
    params = chosen[0].factor * flops ** chosen[0].exponent
    ones = np.ones_like(flops)
    there = Points(params, flops / (6 * params), np.zeros_like(flops), ones, ones)
    low, high = np.percentile(fit.surface.loss_draws(there), [LOW, HIGH], axis=0)
    columns = {"flops": flops, "params": params, "loss": fit.surface.loss(there), "low": low, "high": high}
    return rows_of(columns)


def isoflops(fit: Fit) -> Chart:
    """Loss over size at equal compute, with the vertices."""
    rows, curves, vertices = [], [], []
    for one in fit.profiles:
        rows += [{"flops": one.flops, "params": n, "loss": y} for n, y in zip(one.params, one.loss, strict=True)]
        x = np.log(one.params)
        parabola = np.polynomial.Polynomial.fit(x, np.log(one.loss), 2)
        for value in np.linspace(x.min(), x.max(), 30):
            curves.append({"flops": one.flops, "params": math.exp(value), "loss": math.exp(parabola(value))})
        if one.best_params is not None:
            vertices.append({"flops": one.flops, "params": one.best_params, "loss": one.best_loss})
    tooltip = [number("flops", "C"), number("params", "N"), number("loss", "loss", ".4f")]
    color = colour_by("flops", "C", (one.flops for one in fit.profiles))
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [plain(row) for row in rows]},
            "params": [ZOOM],
            "mark": {"type": "point", "filled": True, "size": 45},
            "encoding": {"color": color, "tooltip": tooltip},
        },
        {
            "data": {"values": [plain(row) for row in curves]},
            "mark": {"type": "line", "strokeWidth": 1.3},
            "encoding": {"color": color, "detail": {"field": "flops"}},
        },
        {
            "data": {"values": [plain(row) for row in vertices]},
            "mark": {"type": "point", "shape": "diamond", "size": 130, "strokeWidth": 2, "color": _STRONG},
            "encoding": {"tooltip": tooltip},
        },
    ]
    caption = (
        "Loss of each size at equal compute, between measured horizons and never beyond them; a parabola in ln N "
        "through each, its vertex a diamond where it lies among the sizes."
    )
    encoding = {"x": logarithmic("params", "N, parameters"), "y": loss_axis("loss")}
    return Chart("isoflops", "Isoflop profiles", caption, layered(layers, encoding))


def allocation(fit: Fit) -> Chart:
    """The best size over compute, by approach."""
    compute = 6 * fit.points.params * fit.points.tokens
    ends = np.exp(np.linspace(np.log(compute.min()), np.log(compute.max() * _BEYOND), 20))
    lines, dots = [], []
    for one in fit.allocations:
        name = f"{one.approach}: C^{one.exponent:.3f}"
        lines += [{"approach": name, "flops": float(c), "params": float(one.factor * c**one.exponent)} for c in ends]
        dots += [
            {"approach": name, "flops": float(c), "params": float(n)}
            for c, n in zip(one.flops, one.params, strict=True)
        ]
    color = {
        "field": "approach",
        "type": "nominal",
        "title": None,
        "scale": {"range": [RAMP[0], RAMP[1], RAMP[3]]},
        "legend": {"orient": "bottom", "columns": 3},
    }
    tooltip = [{"field": "approach"}, number("flops", "C"), number("params", "N")]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": lines},
            "params": [ZOOM],
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {"color": color, "tooltip": tooltip},
        },
        {
            "data": {"values": dots},
            "mark": {"type": "point", "filled": True, "size": 40},
            "encoding": {"color": color, "tooltip": tooltip},
        },
    ]
    dense = ", of dense models" if fit.points.has_moe else ""
    caption = (
        "The size with the least loss for a compute: from the envelope, the isoflop profiles and the fitted law"
        f"{dense}."
    )
    encoding = {"x": logarithmic("flops", "compute, FLOPs"), "y": logarithmic("params", "best N")}
    return Chart("allocation", "Best size over compute", caption, layered(layers, encoding))


def basin(done: Sequence[Observation], fit: Fit, variable: str) -> Chart:
    """Loss over one setting, a line for every model and horizon; of several cells at one value the best."""
    best: dict[tuple[int, float], Observation] = {}
    for group, members in enumerate(same_models(done)):
        for one in members:
            value = getattr(one, variable)
            if value is not None:
                key = (group, short(value))
                best[key] = min(best.get(key, one), one, key=lambda each: each.loss)
    embeddings = fit.settings.embeddings
    rows = [cell_row(one, embeddings=embeddings) | {"group": group} for (group, _), one in best.items()]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": sorted(rows, key=lambda row: row[variable])},
            "params": [ZOOM],
            "mark": {"type": "line", "strokeWidth": 1.2, "opacity": 0.8, "point": {"size": 30}},
            "encoding": {
                "color": colour_by("params", "N", (row["params"] for row in rows)),
                "detail": {"field": "group"},
                "tooltip": cell_tooltip(rows),
            },
        },
        {
            "data": {"values": _best_rows(fit, variable)},
            "mark": {"type": "point", "shape": "diamond", "size": 110, "strokeWidth": 2, "color": _STRONG},
            "encoding": {
                "x": logarithmic("value", "", variable),
                "tooltip": [number("value", "best", kind=variable), number("params", "N"), number("tokens", "D")],
            },
        },
    ]
    caption = (
        f"Loss over {_NAMES[variable]}: a line for every model and horizon, and a diamond at the best of each, as its "
        "own quadratic has it"
    )
    lowest, highest = _losses([one.loss for one in best.values()], fit)
    caption += _beyond(sum(one.loss > highest for one in best.values())) + "."
    encoding = {"x": logarithmic(variable, _NAMES[variable]), "y": loss_axis("loss", highest, lowest)}
    title = f"Loss over {_NAMES[variable].removesuffix(' in tokens')}"
    return Chart(f"loss_over_{variable}", title, caption, layered(layers, encoding))


def optima(fit: Fit, variable: str) -> Chart:
    """The best settings over N, with intervals, and the law for some horizons."""
    rows = _best_rows(fit, variable)
    color = colour_by("tokens", "D", (row["tokens"] for row in rows))
    tooltip = [
        number("value", "best", kind=variable),
        number("low", "5 %", kind=variable),
        number("high", "95 %", kind=variable),
        number("params", "N"),
        number("tokens", "D"),
        {"field": "flags", "title": "flags"},
    ]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": rows},
            "params": [ZOOM],
            "mark": {"type": "point", "filled": True, "size": 60},
            "encoding": {"color": color, "tooltip": tooltip},
        },
        {
            "data": {"values": rows},
            "mark": {"type": "rule", "strokeWidth": 1.2},
            "encoding": {"color": color, "y": logarithmic("low", "", variable), "y2": {"field": "high"}},
        },
    ]
    caption = f"The best {_NAMES[variable]} of every model and horizon with its 90 % interval"
    if fit.basin is not None:
        layers.append(
            {
                "data": {"values": _law_rows(fit, variable)},
                "mark": {"type": "line", "strokeDash": [6, 4]},
                "encoding": {"color": color, "detail": {"field": "tokens"}},
            }
        )
        caption += "; dashed, the law fitted to all cells at once"
    name = _NAMES[variable]
    encoding = {"x": logarithmic("params", "N, parameters"), "y": logarithmic("value", f"best {name}", variable)}
    title = f"Best {name.removesuffix(' in tokens')}"
    return Chart(f"best_{variable}", title, caption + ".", layered(layers, encoding))


def _best_rows(fit: Fit, variable: str) -> list[dict[str, Any]]:
    return [
        {
            "params": float(fit.points.params[one.group]),
            "tokens": float(fit.points.tokens[one.group]),
            "loss": float(np.exp(fit.points.log_loss[one.group])),
            "value": one.value,
            "low": one.low,
            "high": one.high,
            "flags": ", ".join(one.flags) or "none",
        }
        for one in fit.optima
        if one.variable == variable and one.value is not None
    ]


def _law_rows(fit: Fit, variable: str) -> list[dict[str, Any]]:
    assert fit.basin is not None
    place = fit.basin.variables.index(variable)
    horizons = np.exp(np.unique(np.log(fit.points.tokens).round(2)))
    if len(horizons) > _LINES:
        logs = np.linspace(np.log(horizons[0]), np.log(horizons[-1]), _LINES)
        horizons = np.exp(logs)
    sizes = np.linspace(np.log(fit.points.params.min()), np.log(fit.points.params.max()), 20)
    rows = []
    for tokens in horizons:
        best = fit.basin.best(sizes, np.full_like(sizes, np.log(tokens)))[:, place]
        rows += rows_of({"params": np.exp(sizes), "value": np.exp(best), "tokens": np.full_like(sizes, tokens)})
    return rows


def residuals(fit: Fit, surface: Surface) -> Chart:
    """How far the law is from what was measured."""
    points = fit.points
    away = 100 * (np.exp(points.log_loss) / surface.loss(points) - 1)
    rows = [row | {"away": float(one)} for row, one in zip(point_rows(points), away, strict=True)]
    tooltip = [*POINT_TOOLTIP, number("away", "measured over law, %", "+.2f")]
    band = [{"low": -100 * surface.spread, "high": 100 * surface.spread}]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": rows},
            "params": [ZOOM],
            "mark": {"type": "point", "filled": True, "size": 50},
            "encoding": {"color": colour_by("params", "N", points.params), "tooltip": tooltip},
        },
        {
            "data": {"values": band},
            "mark": {"type": "rect", "color": _FAINT, "opacity": 0.15},
            "encoding": {"x": None, "y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}},
        },
        {
            "data": {"values": [{"zero": 0}]},
            "mark": {"type": "rule", "color": _FAINT},
            "encoding": {"x": None, "y": {"field": "zero", "type": "quantitative"}},
        },
    ]
    caption = (
        "Measured loss over the law's, in percent; the band is the scatter about it. A trend here is a law that does "
        "not hold."
    )
    encoding = {
        "x": logarithmic("flops", "compute, FLOPs"),
        "y": {"field": "away", "type": "quantitative", "title": "measured over law, %"},
    }
    return Chart("residuals", "Residuals of the law", caption, layered(layers, encoding))
