"""A fit as a file and as a table."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import atomic_write
from tools.scaling.basin import Basin
from tools.scaling.fit import Fit, Settings
from tools.scaling.observations import Array
from tools.scaling.surface import HIGH, LOW, Points, Surface

FORMAT = 1
# Names of coefficients that are logarithms begin with it.
_LOG = "ln_"


def document(fit: Fit, *, source: str, metric: str | None = None) -> dict[str, Any]:
    """Everything, as JSON holds it.

    Args:
        fit: what was found.
        source: the study or CSV it was found from.
        metric: what was fitted, by its name in metrics.jsonl; None is the loss.
    """
    left = fit.left_out
    return {
        "format": FORMAT,
        "source": source,
        "metric": metric,
        "settings": asdict(fit.settings),
        "counts": fit.counts,
        "headline": None
        if left is None
        else {
            "leave_largest_out_error": left.error,
            "params": left.params,
            "tokens": left.tokens.tolist(),
            "measured": left.measured.tolist(),
            "predicted": left.predicted.tolist(),
        },
        "surface": None if fit.surface is None else _surface(fit.surface),
        "settings_laws": None if fit.basin is None else _basin(fit.basin),
        "on_par": _on_par(fit),
        "allocations": [
            {"approach": one.approach, "factor": one.factor, "exponent": one.exponent, "interval": one.interval}
            for one in fit.allocations
        ],
        "profiles": [
            {
                "flops": one.flops,
                "params": one.params.tolist(),
                "loss": one.loss.tolist(),
                "best_params": one.best_params,
                "best_loss": one.best_loss,
            }
            for one in fit.profiles
        ],
        "points": {name: getattr(fit.points, name).tolist() for name in Points.__dataclass_fields__}
        | {"source": fit.point_source},
        "optima": [asdict(one) for one in fit.optima],
        "notes": fit.notes,
    }


def _surface(found: Surface) -> dict[str, Any]:
    low, high = np.percentile(found.draws, [LOW, HIGH], axis=0)
    coefficients = {
        name: {"value": float(value), "low": float(a), "high": float(b)}
        for name, value, a, b in zip(found.names, found.coefficients, low, high, strict=True)
    }
    shown = {name: coefficient(name, known) for name, known in coefficients.items() if name.startswith(_LOG)}
    return {
        "law": _law(found.names),
        "coefficients": coefficients,
        "constants": {
            name: {"value": value, "low": first, "high": last} for name, value, first, last in shown.values()
        },
        "spread": found.spread,
        "resampled": found.resampled,
        "points": found.points,
        "largest": list(found.largest),
        "draws": _rounded(found.draws),
    }


def _on_par(fit: Fit) -> list[dict[str, float]]:
    """Every kind of MoE model and its dense equal."""
    if fit.surface is None or not {"sigma", "gamma"} & set(fit.surface.names):
        return []
    kinds = {
        (round(float(s), 3), round(float(g), 3))
        for s, g in zip(fit.points.sparsity, fit.points.granularity, strict=True)
    }
    found = []
    for sparsity, granularity in sorted(kinds - {(1.0, 1.0)}):
        factor, low, high = fit.surface.on_par(sparsity, granularity)
        found.append({"sparsity": sparsity, "granularity": granularity, "factor": factor, "low": low, "high": high})
    return found


def _law(names: Sequence[str]) -> str:
    factors = {"alpha": "N^alpha", "sigma": "S^sigma", "gamma": "G^gamma"}
    size = " ".join(text for name, text in factors.items() if name in names)
    return f"L = E + A / {size if ' ' not in size else f'({size})'} + B / D^beta"


def _basin(found: Basin) -> dict[str, Any]:
    return {
        "variables": list(found.variables),
        "features": list(found.features),
        "factors": {
            name: _factor(float(found.centre[0, v]), found.draws[:, 0, v] if len(found.draws) else None)
            for v, name in enumerate(found.variables)
        },
        "curvature": found.curvature.tolist(),
        "centre": found.centre.tolist(),
        "spread": found.spread,
        "without_minimum": found.without_minimum,
        "draws": _rounded(found.draws),
    }


def _factor(middle: float, draws: Array | None) -> dict[str, float | None]:
    """What stands before the powers in the law of a setting, whose fit has its logarithm."""
    low, high = (None, None) if draws is None else (_exp(one) for one in np.percentile(draws, [LOW, HIGH]))
    return {"value": _exp(middle), "low": low, "high": high}


def _exp(value: float) -> float:
    """Finite whatever a version of the data gives: JSON has no infinity."""
    return math.exp(min(value, 700.0))


def _rounded(values: Array) -> Any:
    return np.vectorize(lambda value: float(f"{value:.9g}"), otypes=[float])(values).tolist() if values.size else []


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a fit's file in one step."""
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


class FitFile:
    """A fit read back: the laws, with their versions, and what they were fitted to.

    Args:
        path: what ``write`` wrote.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise DataError(
                    Problem(str(path), content["format"], f"has another format than {FORMAT}; run mq sweep fit again.")
                )
            self.settings = Settings(**content["settings"])
            self.source = str(content["source"])
            self.metric: str | None = content.get("metric")  # fits of earlier versions are of the loss
            self.headline: dict[str, Any] | None = content["headline"]
            self.notes: list[str] = content["notes"]
            points = {name: np.array(content["points"][name]) for name in Points.__dataclass_fields__}
            self.points = Points(**points)
            self.surface = None if content["surface"] is None else _read_surface(content["surface"])
            self.basin = None if content["settings_laws"] is None else _read_basin(content["settings_laws"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            fix = f"is not a fit written by mq sweep fit ({error})."
            raise DataError(Problem(str(path), None, fix)) from None


def _read_surface(content: dict[str, Any]) -> Surface:
    names = tuple(content["coefficients"])
    values = np.array([content["coefficients"][name]["value"] for name in names])
    largest = content["largest"]
    return Surface(
        names,
        values,
        np.array(content["draws"]).reshape(-1, len(names)),
        content["resampled"],
        float(content["spread"]),
        int(content["points"]),
        (float(largest[0]), float(largest[1]), float(largest[2])),
    )


def _read_basin(content: dict[str, Any]) -> Basin:
    features, variables = tuple(content["features"]), tuple(content["variables"])
    return Basin(
        variables,
        features,
        np.array(content["curvature"]),
        np.array(content["centre"]),
        np.array([]),
        np.array(content["draws"]).reshape(-1, len(features), len(variables)),
        float(content["spread"]),
        np.array([], dtype=bool),
        float(content["without_minimum"]),
    )


def table(content: dict[str, Any]) -> str:
    """The fit in words and numbers, the error of prediction first."""
    lines = [f"L is {content['metric']}"] if content.get("metric") else []
    headline = content["headline"]
    if headline:
        lines.append(
            f"leave-largest-out: N = {headline['params']:.3g} is predicted from the smaller ones "
            f"within {headline['leave_largest_out_error']:.2%} of its loss ({len(headline['tokens'])} horizons)"
        )
    embeddings = "with" if content["settings"]["embeddings"] else "without"
    counts = ", ".join(f"{count} {status}" for status, count in content["counts"].items() if count)
    lines.append(f"observations: {counts}; N {embeddings} embeddings; {len(content['points']['params'])} points")
    if surface := content["surface"]:
        lines += [
            "",
            f"{surface['law']}  ({surface['points']} points, {surface['resampled']} resampled, 90 % intervals)",
        ]
        for name, value in surface["coefficients"].items():
            shown, middle, low, high = coefficient(name, value)
            lines.append(f"  {shown:<6}{middle:>12.5g}   {low:.5g} to {high:.5g}")
        lines.append(f"  scatter about the law {surface['spread']:.2%}")
    for one in content["on_par"]:
        lines.append(
            f"an MoE model with {one['sparsity']:.3g} times its active parameters, granularity "
            f"{one['granularity']:.3g}, is on par with a dense model of {one['factor']:.2f} "
            f"({one['low']:.2f} to {one['high']:.2f}) times them"
        )
    if laws := content["settings_laws"]:
        lines += ["", *setting_laws(laws)]
    for one in content["allocations"]:
        sure = "" if one["interval"] is None else f" ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"
        lines.append(f"best N by {one['approach']}: {one['factor']:.3g} C^{one['exponent']:.3f}{sure}")
    if content["optima"]:
        lines += ["", *_optima(content)]
    lines += _predicted(content)
    lines += [f"note: {note}" for note in content["notes"]]
    return "\n".join(lines)


def _predicted(content: dict[str, Any]) -> list[str]:
    lines = []
    for one in content.get("predictions", ()):
        low, high = one["interval"]
        text = f"predicted at N = {one['params']:.3g}, D = {one['tokens']:.3g}: {content['metric'] or 'loss'} "
        text += f"{one['value']:.4f} ({low:.4f} to {high:.4f}, 90 %), {one['beyond']:.3g} times the largest N D"
        if score := one.get("score"):
            low, high = score["interval"]
            text += f"; {score['name']} {score['value']:.4f} ({low:.4f} to {high:.4f}), by {score['models']} models"
        lines.append(text)
    return lines


def coefficient(name: str, value: dict[str, float]) -> tuple[str, float, float, float]:
    """A coefficient as people name it, with its interval: A, where the fit has ln A."""
    middle, low, high = (value[key] for key in ("value", "low", "high"))
    if name.startswith(_LOG):
        middle, low, high = (_exp(one) for one in (middle, low, high))
    return name.removeprefix(_LOG), middle, low, high


def setting_laws(laws: dict[str, Any]) -> list[str]:
    """The best settings as power laws, a line each."""
    centre, draws = np.array(laws["centre"]), np.array(laws["draws"])
    lines = []
    for v, name in enumerate(laws["variables"]):
        factor = _factor(float(centre[0, v]), draws[:, 0, v] if len(draws) else None)
        sure = "" if factor["low"] is None else f" ({factor['low']:.3g} to {factor['high']:.3g})"
        parts = [f"best {name} = {factor['value']:.4g}{sure}"]
        for k, feature in enumerate(laws["features"][1:], start=1):
            low, high = np.percentile(draws[:, k, v], [LOW, HIGH]) if len(draws) else (math.nan, math.nan)
            parts.append(f"{feature.removeprefix(_LOG)}^{centre[k, v]:.3f} ({low:.3f} to {high:.3f})")
        lines.append(" ".join(parts))
    return lines


def _optima(content: dict[str, Any]) -> list[str]:
    points = content["points"]
    lines = [f"{'N':>10}{'D':>10}{'loss':>9}  {'setting':<15}{'best':>11}   90 % interval           flags"]
    for one in content["optima"]:
        group = one["group"]
        value = "-" if one["value"] is None else f"{one['value']:.3g}"
        interval = "-" if one["low"] is None else f"{one['low']:.3g} to {one['high']:.3g}"
        lines.append(
            f"{points['params'][group]:>10.3g}{points['tokens'][group]:>10.3g}{math.exp(points['log_loss'][group]):>9.4f}"
            f"  {one['variable']:<15}{value:>11}   {interval:<24}{', '.join(one['flags'])}".rstrip()
        )
    return lines
