"""What the charts of a report have in common: axes, colours, tooltips, zoom, and data as short as it can be."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tools.scaling.observations import Array, Observation
from tools.scaling.report import vega
from tools.scaling.report.content import counted
from tools.scaling.surface import Points

# Told apart on paper, on white and on black.
RAMP = ["#4c6ef5", "#0ca678", "#f59f00", "#e8590c"]
_HEIGHT = 320
# So many distinct sizes have a line each in a legend.
_FEW = 9

# Drag moves, ctrl and the wheel (or a pinch) zoom, a double click goes back: the wheel alone and a finger still scroll
# the page.
ZOOM = {
    "name": "zoom",
    "select": {
        "type": "interval",
        "translate": "[mousedown, window:mouseup] > window:mousemove!",
        "zoom": "wheel![event.ctrlKey || event.metaKey]",
        "clear": "dblclick",
    },
    "bind": "scales",
}


def layered(layers: list[dict[str, Any]], encoding: dict[str, Any]) -> dict[str, Any]:
    """A chart of layers over one another, as wide as its place."""
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
        "layer": [layer for layer in layers if layer["data"]["values"]],  # Vega complains of one without data
    }


# Powers of ten for what spans them; K, M, B for what people count so.
_FORMS = {"flops": "~e", "learning_rate": "~e"}


def number(name: str, title: str, form: str = "", kind: str = "") -> dict[str, str]:
    """A line of a tooltip; ``kind`` names the quantity where the field does not."""
    form = form or (".3~e" if _FORMS.get(kind or name) else ".3~s")
    return {"field": name, "type": "quantitative", "title": title, "format": form}


def logarithmic(name: str, title: str, kind: str = "") -> dict[str, Any]:
    """An axis in powers; ``kind`` names the quantity where the field does not."""
    form = _FORMS.get(kind or name, "~s")
    scale = {"type": "log", "nice": False, "padding": 12}
    found: dict[str, Any] = {"field": name, "type": "quantitative", "scale": scale}
    return found | {"axis": {"format": form, "tickCount": 6}} | ({"title": title} if title else {})


def loss_axis(name: str, highest: float | None = None, lowest: float | None = None) -> dict[str, Any]:
    """Loss upwards; between two losses at first, where those are given."""
    scale: dict[str, Any] = {"type": "log", "nice": False, "padding": 12}
    if highest is not None and lowest is not None:
        scale |= {"domain": [lowest, highest]}
    axis = {"format": ".3~f", "tickCount": 6}
    return {"field": name, "type": "quantitative", "title": "loss, nats per token", "scale": scale, "axis": axis}


def colour_by(name: str, title: str, values: Iterable[float]) -> dict[str, Any]:
    """Colour by a size: each of a few in the legend, the range of many."""
    distinct = sorted({short(value) for value in values})
    form = _FORMS.get(name, ".3~s").replace("~e", ".2~e")
    few = {"type": "symbol", "values": distinct} if len(distinct) <= _FEW else {"type": "gradient"}
    scale = {"type": "log", "range": RAMP, "nice": False}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, "legend": few | {"format": form}}


POINT_TOOLTIP = [number("params", "N"), number("tokens", "D"), number("flops", "C"), number("loss", "loss", ".4f")]


def cell_tooltip(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What some of the cells have."""
    lines = [
        {"field": "name", "title": "cell"},
        *POINT_TOOLTIP,
        number("total_params", "all parameters"),
        number("granularity", "granularity"),
        number("learning_rate", "learning rate", ".3~e"),
        number("batch_tokens", "batch"),
    ]
    return [line for line in lines if any(row.get(line["field"]) not in (None, "") for row in rows)]


def cell_row(one: Observation, *, embeddings: bool) -> dict[str, Any]:
    """A cell as a chart's data."""
    params = counted(one, embeddings=embeddings)
    known = {name: getattr(one, name) for name in ("learning_rate", "batch_tokens", "total_params", "granularity")}
    row = {"name": one.name, "params": params, "tokens": one.tokens, "flops": 6 * params * one.tokens, "loss": one.loss}
    return plain(row | {name: value for name, value in known.items() if value is not None})


def point_rows(points: Points) -> list[dict[str, Any]]:
    """Points of the loss as a chart's data."""
    columns = {
        "params": points.params,
        "tokens": points.tokens,
        "flops": 6 * points.params * points.tokens,
        "loss": np.exp(points.log_loss),
    }
    return rows_of(columns)


def rows_of(columns: dict[str, Array]) -> list[dict[str, Any]]:
    """Columns as a chart's data."""
    count = len(next(iter(columns.values())))
    return [plain({name: values[index] for name, values in columns.items()}) for index in range(count)]


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers as short as they can be read, as a page of a thousand cells is to stay small; what is none is empty."""
    return {
        name: value if isinstance(value, str) or value is None else short(value) if np.isfinite(value) else None
        for name, value in row.items()
    }


def short(value: float) -> float:
    """With six digits."""
    return float(f"{float(value):.6g}")
