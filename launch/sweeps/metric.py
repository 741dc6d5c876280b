"""A metric of the runs of a study instead of their loss: scores that they had at their last step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_qwen.errors import ConfigError, DataError, Problem, did_you_mean
from megatron_qwen.rundir import RunDirectory
from tools.run_records import read_lines
from tools.scaling.observations import DONE, Observation

# A law of the form E + A / N^alpha + B / D^beta falls to what cannot be improved; these rise.
_RISE = {
    *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc"),
    *("math_verify", "pass@1", "gold_probability"),
}
_NEGATIVE = "gold_logprob"
_SHOWN = 10


def with_metric(observations: Sequence[Observation], runs: Path, metric: str) -> list[Observation]:
    """Observations whose ``loss`` is a metric; log-probabilities with their sign changed.

    Args:
        observations: of a study.
        runs: where the run directories lie, by the names of the cells.
        metric: name in metrics.jsonl.

    Raises:
        ConfigError: the metric rises.
        DataError: a finished run does not have it at its last step, or it is not above 0.
    """
    if metric.split("/")[-1] in _RISE or (metric.count("/") > 1 and metric.split("/")[2] in _RISE):
        task = "/".join(metric.split("/")[:2])
        fix = (
            f"is a share of right answers, which no power law describes; fit {task}/gold_bits_per_byte, and predict "
            f"this one with --score {metric}."
        )
        raise ConfigError(Problem("--metric", metric, fix))
    sign = -1.0 if metric.split("/")[-1] == _NEGATIVE else 1.0
    values = of_runs([one.name for one in observations if one.status == DONE], runs, metric)
    wrong = [
        Problem(f"{name}: {metric}", value, "must be above 0 for a law to be fitted to its logarithm.")
        for name, value in values.items()
        if not 0 < sign * value < math.inf
    ]
    if wrong:
        raise DataError(wrong[:_SHOWN])
    return [replace(one, loss=sign * values[one.name]) if one.status == DONE else one for one in observations]


def shares_of_runs(names: Sequence[str], runs: Path, score: str) -> Mapping[str, float]:
    """A share of right answers of finished runs, by name.

    Raises:
        DataError: runs do not have it, or it is no share.
    """
    found = of_runs(names, runs, score)
    fix = "is no share of right answers, which are from 0 to 1; --score takes accuracies."
    wrong = [Problem(f"{name}: {score}", value, fix) for name, value in found.items() if not 0 <= value <= 1]
    if wrong:
        raise DataError(wrong[:_SHOWN])
    return found


def of_runs(names: Sequence[str], runs: Path, metric: str) -> Mapping[str, float]:
    """A metric of finished runs at their last step, by name.

    Raises:
        DataError: runs do not have it.
    """
    found, missing, known = {}, [], set[str]()
    for name in names:
        records = [record for record in read_lines(RunDirectory(runs / name).metrics) if "iteration" in record]
        last = max(records, key=lambda record: record["iteration"], default={})
        known |= {key for key, value in last.items() if isinstance(value, int | float)}
        value = last.get(metric)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
        else:
            missing.append(name)
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        fix = f"is not in the last step's metrics of {shown}.{did_you_mean(metric, known)}"
        scores = sorted(key for key in known if "/" in key)
        fix += f" There are {', '.join(scores[:_SHOWN])}." if scores else " Runs have it with evaluation.tasks."
        raise DataError(Problem("metric", metric, fix))
    return found
