"""The charts of a report, as Vega-Lite: each a question that a reader of scaling laws asks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.scaling import compute_optimal
from tools.scaling.fit import Fit
from tools.scaling.observations import DONE, Array, Observation
from tools.scaling.report import vega
from tools.scaling.surface import HIGH, LOW, Points, Surface

# Told apart on paper, on white and on black.
_RAMP = ["#4c6ef5", "#0ca678", "#f59f00", "#e8590c"]
_STRONG, _FAINT, _MARK = "#e8590c", "#868e96", "#4c6ef5"
_HEIGHT = 320
_NAMES = {"learning_rate": "learning rate", "batch_tokens": "batch in tokens"}
# How far beyond the largest compute the law is drawn.
_BEYOND = 3.0
# Horizons for which a law of the settings is drawn.
_LINES = 4
# So many distinct sizes have a line each in a legend.
_FEW = 9
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
    rows = [_row(one, embeddings=embedded) for one in done]
    color = _by("params", "N", (row["params"] for row in rows))
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": rows},
            "params": [_ZOOM],
            "mark": {"type": "point", "filled": True, "size": 36, "opacity": 0.55},
            "encoding": {"color": color, "tooltip": _CELL_TOOLTIP},
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
                "data": {"values": _point_rows(kept)},
                "mark": {"type": "line", "color": _STRONG, "strokeWidth": 2.5, "point": {"color": _STRONG, "size": 40}},
                "encoding": {"tooltip": _POINT_TOOLTIP},
            }
        )
        frontier = _frontier(fit)
        if frontier:
            caption += "; the dashed one is the law at the best size for each compute, with its 90 % interval"
            layers += [
                {
                    "data": {"values": frontier},
                    "mark": {"type": "area", "color": _FAINT, "opacity": 0.25},
                    "encoding": {"y": _loss("low"), "y2": {"field": "high"}},
                },
                {
                    "data": {"values": frontier},
                    "mark": {"type": "line", "color": _FAINT, "strokeDash": [6, 4]},
                    "encoding": {
                        "tooltip": [_number("flops", "C"), _number("params", "best N"), _number("loss", "loss", ".4f")]
                    },
                },
            ]
        lowest = min(lowest, *(row["low"] for row in frontier)) if frontier else lowest
    encoding = {"x": _log("flops", "compute, FLOPs"), "y": _loss("loss", highest, lowest)}
    caption += _beyond(sum(one.loss > highest for one in done))
    return Chart("loss_over_compute", "Loss over compute", caption + ".", _spec(layers, encoding))


def _losses(losses: Sequence[float], fit: Fit | None) -> tuple[float, float]:
    """What is shown of them at first."""
    highest = max(losses)
    if fit is not None:
        highest = min(highest, _SHOWN * float(np.exp(fit.points.log_loss.max())))
    return _short(min(losses)), _short(highest)


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
    return _rows(columns)


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
    tooltip = [_number("flops", "C"), _number("params", "N"), _number("loss", "loss", ".4f")]
    color = _by("flops", "C", (one.flops for one in fit.profiles))
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [_plain(row) for row in rows]},
            "params": [_ZOOM],
            "mark": {"type": "point", "filled": True, "size": 45},
            "encoding": {"color": color, "tooltip": tooltip},
        },
        {
            "data": {"values": [_plain(row) for row in curves]},
            "mark": {"type": "line", "strokeWidth": 1.3},
            "encoding": {"color": color, "detail": {"field": "flops"}},
        },
        {
            "data": {"values": [_plain(row) for row in vertices]},
            "mark": {"type": "point", "shape": "diamond", "size": 130, "strokeWidth": 2, "color": _STRONG},
            "encoding": {"tooltip": tooltip},
        },
    ]
    caption = (
        "Loss of each size at equal compute, between measured horizons and never beyond them; a parabola in ln N "
        "through each, its vertex a diamond where it lies among the sizes."
    )
    encoding = {"x": _log("params", "N, parameters"), "y": _loss("loss")}
    return Chart("isoflops", "Isoflop profiles", caption, _spec(layers, encoding))


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
        "scale": {"range": [_RAMP[0], _RAMP[1], _RAMP[3]]},
        "legend": {"orient": "bottom", "columns": 3},
    }
    tooltip = [{"field": "approach"}, _number("flops", "C"), _number("params", "N")]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": lines},
            "params": [_ZOOM],
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {"color": color, "tooltip": tooltip},
        },
        {
            "data": {"values": dots},
            "mark": {"type": "point", "filled": True, "size": 40},
            "encoding": {"color": color, "tooltip": tooltip},
        },
    ]
    caption = "The size with the least loss for a compute: from the envelope, the isoflop profiles and the fitted law."
    encoding = {"x": _log("flops", "compute, FLOPs"), "y": _log("params", "best N")}
    return Chart("allocation", "Best size over compute", caption, _spec(layers, encoding))


def basin(done: Sequence[Observation], fit: Fit, variable: str) -> Chart:
    """Loss over one setting, a line for every model and horizon; of several cells at one value the best."""
    best: dict[tuple[float, float, float], Observation] = {}
    for one in done:
        value = getattr(one, variable)
        if value is None:
            continue
        key = (one.params, one.tokens, value)
        if key not in best or one.loss < best[key].loss:
            best[key] = one
    embeddings = fit.settings.embeddings
    rows = [_row(one, embeddings=embeddings) | {"group": f"{one.params:.6g} {one.tokens:.3g}"} for one in best.values()]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": sorted(rows, key=lambda row: row[variable])},
            "params": [_ZOOM],
            "mark": {"type": "line", "strokeWidth": 1.2, "opacity": 0.8, "point": {"size": 30}},
            "encoding": {
                "color": _by("params", "N", (row["params"] for row in rows)),
                "detail": {"field": "group"},
                "tooltip": _CELL_TOOLTIP,
            },
        },
        {
            "data": {"values": _best_rows(fit, variable)},
            "mark": {"type": "point", "shape": "diamond", "size": 110, "strokeWidth": 2, "color": _STRONG},
            "encoding": {
                "x": _log("value", "", variable),
                "tooltip": [_number("value", "best", kind=variable), _number("params", "N"), _number("tokens", "D")],
            },
        },
    ]
    caption = (
        f"Loss over {_NAMES[variable]}: a line for every model and horizon, and a diamond at the best of each, as its "
        "own quadratic has it"
    )
    lowest, highest = _losses([one.loss for one in best.values()], fit)
    caption += _beyond(sum(one.loss > highest for one in best.values())) + "."
    encoding = {"x": _log(variable, _NAMES[variable]), "y": _loss("loss", highest, lowest)}
    title = f"Loss over {_NAMES[variable].removesuffix(' in tokens')}"
    return Chart(f"loss_over_{variable}", title, caption, _spec(layers, encoding))


def optima(fit: Fit, variable: str) -> Chart:
    """The best settings over N, with intervals, and the law for some horizons."""
    rows = _best_rows(fit, variable)
    color = _by("tokens", "D", (row["tokens"] for row in rows))
    tooltip = [
        _number("value", "best", kind=variable),
        _number("low", "5 %", kind=variable),
        _number("high", "95 %", kind=variable),
        _number("params", "N"),
        _number("tokens", "D"),
        {"field": "flags", "title": "flags"},
    ]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": rows},
            "params": [_ZOOM],
            "mark": {"type": "point", "filled": True, "size": 60},
            "encoding": {"color": color, "tooltip": tooltip},
        },
        {
            "data": {"values": rows},
            "mark": {"type": "rule", "strokeWidth": 1.2},
            "encoding": {"color": color, "y": _log("low", "", variable), "y2": {"field": "high"}},
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
    encoding = {"x": _log("params", "N, parameters"), "y": _log("value", f"best {name}", variable)}
    title = f"Best {name.removesuffix(' in tokens')}"
    return Chart(f"best_{variable}", title, caption + ".", _spec(layers, encoding))


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
    horizons = np.unique(fit.points.tokens.round(-2))
    if len(horizons) > _LINES:
        logs = np.linspace(np.log(horizons[0]), np.log(horizons[-1]), _LINES)
        horizons = np.exp(logs)
    sizes = np.linspace(np.log(fit.points.params.min()), np.log(fit.points.params.max()), 20)
    rows = []
    for tokens in horizons:
        best = fit.basin.best(sizes, np.full_like(sizes, np.log(tokens)))[:, place]
        rows += _rows({"params": np.exp(sizes), "value": np.exp(best), "tokens": np.full_like(sizes, tokens)})
    return rows


def residuals(fit: Fit, surface: Surface) -> Chart:
    """How far the law is from what was measured."""
    points = fit.points
    away = 100 * (np.exp(points.log_loss) / surface.loss(points) - 1)
    rows = [row | {"away": float(one)} for row, one in zip(_point_rows(points), away, strict=True)]
    tooltip = [*_POINT_TOOLTIP, _number("away", "measured over law, %", "+.2f")]
    band = [{"low": -100 * surface.spread, "high": 100 * surface.spread}]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": rows},
            "params": [_ZOOM],
            "mark": {"type": "point", "filled": True, "size": 50},
            "encoding": {"color": _by("params", "N", points.params), "tooltip": tooltip},
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
        "x": _log("flops", "compute, FLOPs"),
        "y": {"field": "away", "type": "quantitative", "title": "measured over law, %"},
    }
    return Chart("residuals", "Residuals of the law", caption, _spec(layers, encoding))


# Drag moves, ctrl and the wheel (or a pinch) zoom, a double click goes back: the wheel alone and a finger still scroll
# the page.
_ZOOM = {
    "name": "zoom",
    "select": {
        "type": "interval",
        "translate": "[mousedown, window:mouseup] > window:mousemove!",
        "zoom": "wheel![event.ctrlKey || event.metaKey]",
        "clear": "dblclick",
    },
    "bind": "scales",
}


def _spec(layers: list[dict[str, Any]], encoding: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": vega.SCHEMA,
        "width": "container",
        "height": _HEIGHT,
        "autosize": {"type": "fit", "contains": "padding"},
        "background": None,
        "config": {
            "view": {"stroke": None},
            "axis": {"gridOpacity": 0.5, "labelFlush": True},
            "font": "system-ui, sans-serif",
        },
        "encoding": encoding,
        "layer": layers,
    }


# Powers of ten for what spans them; K, M, B for what people count so.
_FORMS = {"flops": "~e", "learning_rate": "~e"}


def _number(name: str, title: str, form: str = "", kind: str = "") -> dict[str, str]:
    """A line of a tooltip; ``kind`` names the quantity where the field does not."""
    form = form or (".3~e" if _FORMS.get(kind or name) else ".3~s")
    return {"field": name, "type": "quantitative", "title": title, "format": form}


def _log(name: str, title: str, kind: str = "") -> dict[str, Any]:
    form = _FORMS.get(kind or name, "~s")
    scale = {"type": "log", "nice": False, "padding": 12}
    found: dict[str, Any] = {"field": name, "type": "quantitative", "scale": scale}
    return found | {"axis": {"format": form, "tickCount": 6}} | ({"title": title} if title else {})


def _loss(name: str, highest: float | None = None, lowest: float | None = None) -> dict[str, Any]:
    """Loss upwards; between two losses at first, where those are given."""
    scale: dict[str, Any] = {"type": "log", "nice": False, "padding": 12}
    if highest is not None and lowest is not None:
        scale |= {"domain": [lowest, highest]}
    axis = {"format": ".3~f", "tickCount": 6}
    return {"field": name, "type": "quantitative", "title": "loss, nats a token", "scale": scale, "axis": axis}


def _by(name: str, title: str, values: Iterable[float]) -> dict[str, Any]:
    """Colour by a size: each of a few in the legend, the range of many."""
    distinct = sorted({_short(value) for value in values})
    form = _FORMS.get(name, ".3~s").replace("~e", ".2~e")
    few = {"type": "symbol", "values": distinct} if len(distinct) <= _FEW else {"type": "gradient"}
    scale = {"type": "log", "range": _RAMP, "nice": False}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, "legend": few | {"format": form}}


_POINT_TOOLTIP = [_number("params", "N"), _number("tokens", "D"), _number("flops", "C"), _number("loss", "loss", ".4f")]
_CELL_TOOLTIP = [
    {"field": "name", "title": "cell"},
    *_POINT_TOOLTIP,
    _number("learning_rate", "learning rate", ".3~e"),
    _number("batch_tokens", "batch"),
]


def _row(one: Observation, *, embeddings: bool) -> dict[str, Any]:
    params = one.params + (one.embedding_params or 0.0 if embeddings else 0.0)
    known = {"learning_rate": one.learning_rate, "batch_tokens": one.batch_tokens}
    row = {"name": one.name, "params": params, "tokens": one.tokens, "flops": 6 * params * one.tokens, "loss": one.loss}
    return _plain(row | {name: value for name, value in known.items() if value is not None})


def _point_rows(points: Points) -> list[dict[str, Any]]:
    columns = {
        "params": points.params,
        "tokens": points.tokens,
        "flops": 6 * points.params * points.tokens,
        "loss": np.exp(points.log_loss),
    }
    return _rows(columns)


def _rows(columns: dict[str, Array]) -> list[dict[str, Any]]:
    count = len(next(iter(columns.values())))
    return [_plain({name: values[index] for name, values in columns.items()}) for index in range(count)]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers as short as they can be read: a page of a thousand cells is to stay small."""
    return {name: value if isinstance(value, str) or value is None else _short(value) for name, value in row.items()}


def _short(value: float) -> float:
    return float(f"{float(value):.6g}")
