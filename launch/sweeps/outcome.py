"""The result of a run of a study, from its run directory alone."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.errors import EXIT_NUMERICS
from megatron_qwen.rundir import RunDirectory, RunState
from tools.run_records import read_lines
from tools.scaling.loss_curve import TAIL, tail_means, went_astray
from tools.scaling.observations import DIVERGED, DONE, FAILED, UNFINISHED


@dataclass(frozen=True)
class RunOutcome:
    """How a run stands.

    Args:
        status: done, diverged, failed or unfinished.
        loss: final, in nats a token; NaN without one.
        measured: what ``loss`` is.
        iteration: last finished step.
        why: one line.
    """

    status: str
    loss: float
    measured: str
    iteration: int
    why: str


def outcome(run_dir: Path, *, iterations: int, stem: Path | None = None, begins: int = 0) -> RunOutcome:
    """Reads a run directory.

    Divergence is a result: numbers that were not finite, or a loss that ends more than a tenth above where it has
    been, in the run or in the stem that it resumed from.

    Args:
        run_dir: of the run; need not exist.
        iterations: length of the run.
        stem: directory of the run that it branched off, or None.
        begins: iteration of the stem at which it did.
    """
    directory = RunDirectory(run_dir)
    steps = _steps(directory)
    last = max(steps, default=0)
    state = directory.state()
    if _numerics(directory):
        return RunOutcome(DIVERGED, math.nan, "", last, "stopped because loss or gradients were not finite")
    if state in (RunState.STOPPED, RunState.CANCELLED):
        attempts = AttemptLog(directory.attempts).read()
        reason = attempts[-1].reason if attempts else None
        return RunOutcome(FAILED, math.nan, "", last, f"{state.value}: {reason or 'see its logs'}")
    if state is not RunState.DONE:
        return RunOutcome(UNFINISHED, math.nan, "", last, "not begun" if state is None else state.value)
    if last < iterations:
        why = f"is done, but its metrics end at iteration {last} of {iterations}"
        return RunOutcome(FAILED, math.nan, "", last, why)
    means = tail_means(_losses(steps))
    before = {} if stem is None else _until(stem, begins)
    if (astray := went_astray(tail_means(_losses(before | steps)) if before else means)) is not None:
        return RunOutcome(DIVERGED, math.nan, "", last, astray)
    validation = steps[last].get("validation_loss")
    if isinstance(validation, int | float) and math.isfinite(validation):
        return RunOutcome(DONE, float(validation), "validation", last, "")
    return RunOutcome(DONE, float(means[-1]), f"mean of the last {TAIL:.0%} of the steps", last, "")


def astray_by(run_dir: Path, iteration: int) -> str | None:
    """Why a run had diverged when it came to an iteration, or None: what branches off there is lost with it."""
    steps = _until(run_dir, iteration)
    return went_astray(tail_means(_losses(steps))) if steps else None


def _until(run_dir: Path, iteration: int) -> dict[int, dict[str, object]]:
    return {number: record for number, record in _steps(RunDirectory(run_dir)).items() if number <= iteration}


def _losses(steps: dict[int, dict[str, object]]) -> list[float]:
    """In the order of the steps, NaN where a step has none."""
    return [_number(steps[iteration].get("lm_loss")) for iteration in sorted(steps)]


def _steps(directory: RunDirectory) -> dict[int, dict[str, object]]:
    """Records by iteration; of a step that was done again the newest."""
    found: dict[int, dict[str, object]] = {}
    for record in read_lines(directory.metrics):
        if isinstance(iteration := record.get("iteration"), int):
            found[iteration] = record
    return found


def _numerics(directory: RunDirectory) -> bool:
    attempts = AttemptLog(directory.attempts).read()
    return bool(attempts) and (attempts[-1].reason == "numerics" or attempts[-1].exit_code == EXIT_NUMERICS)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
