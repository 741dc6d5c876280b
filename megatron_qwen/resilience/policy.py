"""What follows the end of an attempt: the code that reads the table in ``resilience.rules``.

The decision is a function of attempts.jsonl alone. So a requeued job, or the controller that replaces one lost with its
node, decides as the old one would have.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qwen.attempts import Attempt
from megatron_qwen.errors import EXIT_DO_NOT_REQUEUE
from megatron_qwen.resilience.blame import Blame, Failure, Fault, weigh
from megatron_qwen.resilience.evidence import FailureEvidence, evidence_of
from megatron_qwen.resilience.rules import POLICY, RULES, Action, Counted, Reason

# The first wait is the one that Slurm itself makes after a requeue. The others are chosen by hand: a full disk is
# noticed and emptied within hours, and 24 tries take ten of them.
_FIRST_DELAY_S, _LONGEST_DELAY_S, _STORAGE_TRIES = 120.0, 1800.0, 24
_UNBEGUN_DELAY_S = 600.0
# Restarts in a row from ever newer local checkpoints, without a committed one, that do not count. Chosen by hand: a
# fault between any two checkpoints twelve times in a row is no accident.
_UNSAVED_RESTARTS = 12
_MAY_PASS = (Reason.STORAGE, Reason.UNHEALTHY_NODE)
# Ends that are weighed together to find whose fault they are. The others that end a run are the program's, or a
# person's: its configuration, its data.
_FAILURES = frozenset(
    (*(rule.reason for rule in POLICY if rule.exclude_after is not None), Reason.STORAGE, Reason.ERROR)
)
_OF_PROGRAM = (Reason.CONFIGURATION, Reason.DATA, Reason.CHECKPOINT, Reason.NUMERICS)


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended, as its controller recorded it.

    Args:
        reason: row of the table.
        detail: one line for a reader.
        failed_nodes: nodes to blame.
        error: signature of the exception that ended it, None if there was none.
        iteration: last finished iteration, None if no step finished.
        gained: iterations the attempt added.
        saved: newest committed iteration now.
        evidence: of the first failure; None where there is none.
        job_nodes: nodes of the job.
    """

    reason: Reason
    detail: str
    failed_nodes: tuple[str, ...] = ()
    error: str | None = None
    iteration: int | None = None
    gained: int = 0
    saved: int = 0
    evidence: FailureEvidence | None = None
    job_nodes: int = 1


@dataclass(frozen=True)
class Decision:
    """What to do next.

    Args:
        action: none, requeue or stop.
        why: one line for a reader.
        exit_code: of the job.
        exclude: every node that the job must avoid from now on.
        delay_s: how long the next attempt has to wait.
        blame: whose fault the end was; None where nothing failed.
    """

    action: Action
    why: str
    exit_code: int
    exclude: tuple[str, ...]
    delay_s: float = 0.0
    blame: Blame | None = None


def decide(earlier: Sequence[Attempt], outcome: AttemptOutcome, *, max_restarts_without_progress: int) -> Decision:
    """Reads the table for an attempt that has just ended.

    Args:
        earlier: the attempts before it.
        outcome: how it ended.
        max_restarts_without_progress: the run stops after this many counted restarts in a row without a newer
            checkpoint.
    """
    rule = RULES[outcome.reason]
    blame = blame_of(earlier, outcome)
    exclude = excluded_nodes(earlier, outcome)
    pattern = f"; {blame.why}" if blame is not None and blame.why else ""

    def stop(why: str) -> Decision:
        return Decision(Action.STOP, why + pattern, EXIT_DO_NOT_REQUEUE, exclude, blame=blame)

    if rule.action is not Action.REQUEUE:
        why = (
            outcome.detail if rule.action is Action.NONE else f"{outcome.detail}; a restart would fail in the same way"
        )
        return Decision(rule.action, why, rule.exit_code, exclude, blame=blame)
    if _same_error_again(earlier, outcome):
        return stop(f"the same error occurred twice at the same iteration: {outcome.error}")
    fruitless = _fruitless(earlier, outcome)
    if fruitless >= max_restarts_without_progress:
        return stop(
            f"{fruitless} restarts without a newer checkpoint (resilience.max_restarts_without_progress); "
            f"the last attempt ended with: {outcome.reason}, {outcome.detail}"
        )
    in_a_row = _in_a_row(earlier, outcome)
    if outcome.reason is Reason.STORAGE and in_a_row > _STORAGE_TRIES:
        return stop(f"{in_a_row} attempts in a row could not write; the last one ended with: {outcome.detail}")
    delay_s = backoff_s(in_a_row - (outcome.reason is not Reason.STORAGE))
    why = f"{outcome.reason}: {outcome.detail}{pattern}"
    return Decision(Action.REQUEUE, why, rule.exit_code, exclude, delay_s, blame)


def decide_unbegun(detail: str, *, tries: int | None) -> Decision:
    """What follows where the run's files tell nothing, because they cannot be written.

    Args:
        detail: what is wrong with their file system.
        tries: of this process in a row; None where each is a start of the job. Slurm counts those together with
            preemptions and time limits, so they are no number of faults.
    """
    rule, why = RULES[Reason.STORAGE], f"{Reason.STORAGE}: {detail}"
    if tries is not None and tries > _STORAGE_TRIES:
        return Decision(Action.STOP, why, EXIT_DO_NOT_REQUEUE, ())
    return Decision(rule.action, why, rule.exit_code, (), _UNBEGUN_DELAY_S if tries is None else backoff_s(tries))


def backoff_s(faults: int) -> float:
    """Seconds to wait after so many faults that followed one another at once: 2, 4, 8 minutes up to half an hour."""
    return min(_FIRST_DELAY_S * 2.0 ** min(faults - 1, 16), _LONGEST_DELAY_S) if faults > 0 else 0.0


def _in_a_row(earlier: Sequence[Attempt], outcome: AttemptOutcome) -> int:
    """Attempts, this one included, that ended in a row for a reason that may pass, without a newer checkpoint.

    Other failures need no pause: a restart elsewhere, or a stop, is what helps.
    """
    if outcome.reason not in _MAY_PASS:
        return 0
    same = itertools.takewhile(
        lambda one: one.reason == outcome.reason and (one.saved or 0) >= outcome.saved, reversed(earlier)
    )
    return 1 + sum(1 for _ in same)


def excluded_nodes(earlier: Sequence[Attempt], outcome: AttemptOutcome | None = None) -> tuple[str, ...]:
    """Nodes that the failures of the run, taken together, are the fault of (``resilience.blame``).

    A node whose health check failed, or that reports broken hardware, is excluded at once. A lost node, a lost peer and
    a hang may have other causes (a network fault, a maintenance reboot, the program), so these need a second failure of
    the node that is not the program's. Failures of different kinds add up.
    """
    failures = _failures(earlier, outcome)
    return weigh(failures).avoid if failures else ()


def blame_of(earlier: Sequence[Attempt], outcome: AttemptOutcome) -> Blame | None:
    """Whose fault the end of an attempt is; None where nothing failed."""
    if _failure_of_outcome(outcome) is None:
        return Blame(Fault.PROGRAM) if outcome.reason in _OF_PROGRAM else None
    return weigh(_failures(earlier, outcome))


def _failures(earlier: Sequence[Attempt], outcome: AttemptOutcome | None) -> list[Failure]:
    found = [
        Failure(
            Reason(attempt.reason),
            attempt.failed_nodes,
            evidence_of(attempt.evidence),
            attempt.gained or 0,
            len(attempt.nodes) or 1,
        )
        for attempt in earlier
        if attempt.reason in _FAILURES
    ]
    last = None if outcome is None else _failure_of_outcome(outcome)
    return [*found, *([] if last is None else [last])]


def _failure_of_outcome(outcome: AttemptOutcome) -> Failure | None:
    if outcome.reason not in _FAILURES:
        return None
    return Failure(outcome.reason, outcome.failed_nodes, outcome.evidence, outcome.gained, outcome.job_nodes)


def _counts(reason: str | None, gained: int | None) -> bool:
    if reason not in set(Reason):
        return reason is None  # nobody recorded the end: assume a failure
    counted = RULES[Reason(reason)].counted
    return counted is Counted.ALWAYS or counted is (Counted.WITH_STEPS if gained else Counted.WITHOUT_STEPS)


def _fruitless(earlier: Sequence[Attempt], outcome: AttemptOutcome) -> int:
    """Number of counted restarts since the newest checkpoint was committed, the attempt that just ended included.

    Example: attempts that leave the newest checkpoint at iterations 0, 200, 200, 200 and all end for a counted reason
    give 2. The second attempt made progress, which sets the count back to 0.

    A restart that begins further than any before it, from a local checkpoint, does not count, but does not set the
    count back either: what only the nodes hold is lost with them. After some of these in a row all count.
    """
    ends = [(one.reason, one.gained, one.saved, one.iteration) for one in earlier]
    ends.append((outcome.reason, outcome.gained, outcome.saved, outcome.iteration))
    count, newest, furthest, unsaved = 0, 0, 0, 0
    for index, (reason, gained, saved, iteration) in enumerate(ends):
        # Where the attempt began. Beyond every checkpoint that is the work of a local one: the attempt before it was
        # not in vain.
        began = (iteration or 0) - (gained or 0)
        forward, furthest = began > max(furthest, newest), max(furthest, began)
        if saved is not None and saved > newest:
            count, newest, unsaved = 0, saved, 0
        elif forward and index and unsaved < _UNSAVED_RESTARTS:
            unsaved += 1
        elif index and _counts(reason, gained):  # the first attempt is not a restart
            count += 1
    return count


def _same_error_again(earlier: Sequence[Attempt], outcome: AttemptOutcome) -> bool:
    if outcome.error is None:
        return False
    failures = [attempt for attempt in earlier if attempt.error is not None]
    return bool(failures) and (failures[-1].error, failures[-1].iteration) == (outcome.error, outcome.iteration)
