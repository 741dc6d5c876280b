"""How sure a score is: bootstrap intervals over the items of a task."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

LEVEL = 0.95
_RESAMPLES, _SEED, _BATCH = 2000, 0, 50
_SAME = 1e-9  # of the harness's figure: its aggregation is another where the statistic gives something else

Values = np.ndarray[Any, np.dtype[np.float64]]


def intervals(found: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Percentile intervals at 95 % of each metric of each task, as [low, high] (Efron 1979).

    Metrics whose figure is no mean over items, nor a ratio of two sums, have none.

    Args:
        found: what the harness gives.
    """
    return {task: _of_task(samples, found["results"].get(task, {})) for task, samples in found["samples"].items()}


def _of_task(samples: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> dict[str, list[float]]:
    made = {}
    for name, figure in figures.items():
        metric, _, kind = name.partition(",")
        if not isinstance(figure, float | int) or metric.endswith("_stderr"):
            continue
        values = of_items(samples, metric, kind)
        statistic = None if values is None else _statistic(metric, values, figure)
        if values is not None and statistic is not None:
            made[name] = interval(values, statistic)
    return made


def of_items(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> Values | None:
    """A metric of every item, [items], or [items, 2] of sums; None where an item has no number.

    Args:
        samples: the items.
        metric: its name.
        kind: which of the harness's filters; ``none`` of a task that has others is what no filter changes.
    """
    if samples and kind == "none" and all(sample.get("filter", "none") != kind for sample in samples):
        kind = samples[0]["filter"]
    found = [sample.get(metric) for sample in samples if sample.get("filter", "none") == kind]
    try:
        values = np.array(found, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    fits = values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 2)
    return values if len(values) and fits and np.isfinite(values).all() else None


def _statistic(metric: str, values: Values, figure: float) -> Callable[..., Any] | None:
    """The mean, or for a text's perplexity the harness's function of two sums; None if neither gives the figure."""
    if values.ndim == 1:
        found: Callable[..., Any] = _mean
    else:
        found = {"bits_per_byte": _bits}.get(metric, _perplexity)
    return found if math.isclose(float(found(*_columns(values), axis=-1)), figure, rel_tol=_SAME) else None


def interval(values: Values, statistic: Callable[..., Any]) -> list[float]:
    """[low, high]; both are the figure itself where all items are equal or there is one."""
    columns = _columns(values)
    if len(values) < 2 or (values == values[0]).all():
        return [float(statistic(*columns, axis=-1))] * 2
    found = bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def _columns(values: Values) -> tuple[Values, ...]:
    return (values,) if values.ndim == 1 else tuple(values.T)


def _mean(values: Values, axis: int) -> Any:
    return values.mean(axis=axis)


def _perplexity(logprobs: Values, weights: Values, axis: int) -> Any:
    return np.exp(-logprobs.sum(axis=axis) / weights.sum(axis=axis))


def _bits(logprobs: Values, weights: Values, axis: int) -> Any:
    return -logprobs.sum(axis=axis) / weights.sum(axis=axis) / math.log(2)
