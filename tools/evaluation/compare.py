"""Two models' scores in the same items, with paired tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, permutation_test

from megatron_qwen.errors import DataError, Problem
from megatron_qwen.json_lines import objects
from tools.evaluation.intervals import Values, interval, of_items
from tools.evaluation.scoring import RESULTS, SAMPLES

_RESAMPLES, _SEED, _BATCH = 10_000, 0, 100


def compare(first: Path, second: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Differences of metrics over the items that both have answered, second minus first.

    Metrics of 0 and 1 are compared by McNemar's exact test, others by permutation of signs, both two-sided. The
    interval of the difference is a bootstrap over items at 95 %.

    Returns:
        By task and metric: both means, their difference, its interval, p, and the number of items.

    Raises:
        DataError: a directory has no results, or the two have no items in common.
    """
    results = {path: _results(path) for path in (first, second)}
    tasks = [task for task in results[first]["results"] if task in results[second]["results"]]
    found = {}
    for task in tasks:
        samples = [_samples(path, task) for path in (first, second)]
        if all(samples) and (rows := _of_task(results[first]["results"][task], *samples)):
            found[task] = rows
    if not found:
        raise DataError(Problem(f"{first} {second}", None, "have no items in common; score both in the same tasks."))
    return found


def table(compared: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """For people."""
    head = f"{'task':28} {'metric':20} {'first':>9} {'second':>9} {'difference':>11}"
    lines = [f"{head}  95 % interval        p        items"]
    for task, rows in compared.items():
        for metric, row in rows.items():
            low, high = row["interval"]
            lines.append(
                f"{task:28} {metric:20} {row['first']:9.4f} {row['second']:9.4f} {row['difference']:+11.4f}"
                f"  [{low:+.4f}, {high:+.4f}]  {row['p']:.4f}  {row['items']:>6,}"
            )
    return "\n".join(lines)


def _of_task(figures: Mapping[str, Any], *samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    by_item = [{_name(sample): sample for sample in some} for some in samples]
    common = sorted(by_item[0].keys() & by_item[1].keys())
    rows = {}
    for name in figures:
        metric, _, kind = name.partition(",")
        values = [of_items([side[item] for item in common if item[0] == kind], metric, kind) for side in by_item]
        if values[0] is not None and values[1] is not None and values[0].ndim == values[1].ndim == 1:
            rows[metric if kind == "none" else name] = paired(values[0], values[1])
    return rows


def _name(sample: Mapping[str, Any]) -> tuple[str, str, str]:
    """What tells that two answers are to the same item with the same prompt."""
    return (str(sample.get("filter", "none")), str(sample.get("doc_id")), str(sample.get("prompt_hash")))


def paired(first: Values, second: Values) -> dict[str, Any]:
    """The comparison of a metric, item by item."""
    difference = second - first
    return {
        "first": float(first.mean()),
        "second": float(second.mean()),
        "difference": float(difference.mean()),
        "interval": interval(difference, lambda values, axis: values.mean(axis=axis)),
        "p": _p(first, second),
        "items": len(first),
    }


def _p(first: Values, second: Values) -> float:
    difference = second - first
    if not difference.any():
        return 1.0
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        better, worse = int((difference > 0).sum()), int((difference < 0).sum())
        return float(binomtest(better, better + worse).pvalue)
    found = permutation_test(
        (first, second),
        lambda one, other, axis: (other - one).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        rng=np.random.default_rng(_SEED),
    )
    return float(found.pvalue)


def _results(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / RESULTS).read_bytes())
    except FileNotFoundError:
        fix = f"has no {RESULTS}; name what --output of mq eval has made."
        raise DataError(Problem(str(path), None, fix)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(Problem(str(path / RESULTS), None, f"cannot be read ({error}).")) from None
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise DataError(Problem(str(path / RESULTS), None, "has no results; evaluate again."))
    return content


def _samples(path: Path, task: str) -> list[dict[str, Any]]:
    try:
        return list(objects((path / SAMPLES / f"{task}.jsonl").read_bytes().splitlines()))
    except OSError:
        return []
