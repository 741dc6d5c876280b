"""What follows the end of an attempt: one table, and the code that reads it.

The decision is a function of attempts.jsonl alone. So a requeued job, or the controller that replaces one lost with its
node, decides as the old one would have.

docs/slurm.md prints the table; a test compares the two.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_qwen.attempts import Attempt
from megatron_qwen.errors import EXIT_DO_NOT_REQUEUE, EXIT_FAILURE, EXIT_LOST_PEER, EXIT_REQUEUE

EXIT_TERMINATED = 143


class Reason(StrEnum):
    """Why an attempt ended."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    OUT_OF_TIME = "out of time"
    REQUEUED = "requeued by hand"
    CANCELLED = "cancelled"
    UNHEALTHY_NODE = "unhealthy node"
    LOST_NODE = "lost node"
    LOST_PEER = "lost peer"
    HANG = "hang"
    ERROR = "error"
    CONFIGURATION = "configuration"
    DATA = "data"
    CHECKPOINT = "checkpoint"
    NUMERICS = "numerics"


class Action(StrEnum):
    """What follows an attempt."""

    NONE = "none"
    REQUEUE = "requeue"
    STOP = "stop"


@dataclass(frozen=True)
class RequeueRule:
    """A row of the table.

    Args:
        reason: why the attempt ended.
        sign: the evidence for it.
        action: what follows.
        counted: whether a restart for this reason counts against ``resilience.max_restarts_without_progress``.
            None: only if the attempt added no iteration.
        exclude_after: failures of a node after which the job excludes it; None: nodes are not to blame.
        exit_code: of the job.
    """

    reason: Reason
    sign: str
    action: Action
    counted: bool | None
    exclude_after: int | None
    exit_code: int


POLICY: tuple[RequeueRule, ...] = (
    RequeueRule(Reason.FINISHED, "every rank exited with code 0", Action.NONE, False, None, 0),
    RequeueRule(
        Reason.PREEMPTED,
        "SIGUSR2 or SIGTERM before the time limit, whoever sent it; the ranks saved and exited with code 75",
        Action.REQUEUE,
        False,
        None,
        EXIT_REQUEUE,
    ),
    RequeueRule(
        Reason.OUT_OF_TIME,
        "SIGUSR2 shortly before the time limit; the ranks saved and exited with code 75",
        Action.REQUEUE,
        None,
        None,
        EXIT_REQUEUE,
    ),
    RequeueRule(
        Reason.REQUEUED,
        "the job was requeued, by `scontrol requeue` or by Slurm, and no node is reported as down",
        Action.REQUEUE,
        False,
        None,
        EXIT_REQUEUE,
    ),
    RequeueRule(Reason.CANCELLED, "`mq launch cancel`, `scancel`", Action.NONE, False, None, EXIT_TERMINATED),
    RequeueRule(
        Reason.UNHEALTHY_NODE,
        "slurm/healthcheck.sh failed on some nodes before any rank started",
        Action.REQUEUE,
        True,
        1,
        EXIT_LOST_PEER,
    ),
    RequeueRule(Reason.LOST_NODE, "Slurm reports a node of the job as down", Action.REQUEUE, True, 2, EXIT_LOST_PEER),
    RequeueRule(
        Reason.LOST_PEER,
        "a rank was killed or lost its connection while its node still answers",
        Action.REQUEUE,
        True,
        2,
        EXIT_LOST_PEER,
    ),
    RequeueRule(
        Reason.HANG,
        "no step for `resilience.hang_timeout_s`; the stacks of all ranks are in the logs",
        Action.REQUEUE,
        True,
        2,
        EXIT_LOST_PEER,
    ),
    RequeueRule(
        Reason.ERROR,
        "an exception; if the previous error was the same at the same iteration, the run stops",
        Action.REQUEUE,
        True,
        None,
        EXIT_FAILURE,
    ),
    RequeueRule(Reason.CONFIGURATION, "a rank exited with code 2", Action.STOP, False, None, EXIT_DO_NOT_REQUEUE),
    RequeueRule(Reason.DATA, "a rank exited with code 3", Action.STOP, False, None, EXIT_DO_NOT_REQUEUE),
    RequeueRule(Reason.CHECKPOINT, "a rank exited with code 4", Action.STOP, False, None, EXIT_DO_NOT_REQUEUE),
    RequeueRule(Reason.NUMERICS, "a rank exited with code 17", Action.STOP, False, None, EXIT_DO_NOT_REQUEUE),
)
RULES: dict[Reason, RequeueRule] = {rule.reason: rule for rule in POLICY}


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
    """

    reason: Reason
    detail: str
    failed_nodes: tuple[str, ...] = ()
    error: str | None = None
    iteration: int | None = None
    gained: int = 0
    saved: int = 0


@dataclass(frozen=True)
class Decision:
    """What to do next.

    Args:
        action: none, requeue or stop.
        why: one line for a reader.
        exit_code: of the job.
        exclude: every node that the job must avoid from now on.
    """

    action: Action
    why: str
    exit_code: int
    exclude: tuple[str, ...]


def decide(earlier: Sequence[Attempt], outcome: AttemptOutcome, *, max_restarts_without_progress: int) -> Decision:
    """Reads the table for an attempt that has just ended.

    Args:
        earlier: the attempts before it.
        outcome: how it ended.
        max_restarts_without_progress: the run stops after this many counted restarts in a row without a newer
            checkpoint.
    """
    rule = RULES[outcome.reason]
    exclude = excluded_nodes(earlier, outcome)
    if rule.action is not Action.REQUEUE:
        why = (
            outcome.detail if rule.action is Action.NONE else f"{outcome.detail}; a restart would fail in the same way"
        )
        return Decision(rule.action, why, rule.exit_code, exclude)
    if _same_error_again(earlier, outcome):
        why = f"the same error occurred twice at the same iteration: {outcome.error}"
        return Decision(Action.STOP, why, EXIT_DO_NOT_REQUEUE, exclude)
    fruitless = _fruitless(earlier, outcome)
    if fruitless >= max_restarts_without_progress:
        why = (
            f"{fruitless} restarts without a newer checkpoint (resilience.max_restarts_without_progress); "
            f"the last attempt ended with: {outcome.reason}, {outcome.detail}"
        )
        return Decision(Action.STOP, why, EXIT_DO_NOT_REQUEUE, exclude)
    return Decision(Action.REQUEUE, f"{outcome.reason}: {outcome.detail}", rule.exit_code, exclude)


def excluded_nodes(earlier: Sequence[Attempt], outcome: AttemptOutcome | None = None) -> tuple[str, ...]:
    """Nodes that have failed the run as often as the table allows.

    A node whose health check failed is excluded at once: the check has tested that node alone. A lost node, a lost peer
    and a hang may have other causes (a network fault, a maintenance reboot), so these need a second failure. Failures
    of different kinds add up.
    """
    ends = [(attempt.reason, attempt.failed_nodes) for attempt in earlier]
    if outcome is not None:
        ends.append((outcome.reason, outcome.failed_nodes))
    failures: Counter[str] = Counter()
    at_once: set[str] = set()
    for reason, nodes in ends:
        rule = RULES[Reason(reason)] if reason in set(Reason) else None
        if rule is None or rule.exclude_after is None:
            continue
        failures.update(nodes)
        at_once.update(nodes if rule.exclude_after == 1 else ())
    limit = RULES[Reason.LOST_NODE].exclude_after or 1
    return tuple(sorted(at_once | {node for node, count in failures.items() if count >= limit}))


def _counts(reason: str | None, gained: int | None) -> bool:
    if reason not in set(Reason):
        return reason is None  # nobody recorded the end: assume a failure
    counted = RULES[Reason(reason)].counted
    return not gained if counted is None else counted


def _fruitless(earlier: Sequence[Attempt], outcome: AttemptOutcome) -> int:
    """Number of counted restarts since the newest checkpoint was committed, the attempt that just ended included.

    Example: attempts that leave the newest checkpoint at iterations 0, 200, 200, 200 and all end for a counted reason
    give 2. The second attempt made progress, which sets the count back to 0.
    """
    ends = [(attempt.reason, attempt.gained, attempt.saved) for attempt in earlier]
    ends.append((outcome.reason, outcome.gained, outcome.saved))
    count, newest = 0, 0
    for index, (reason, gained, saved) in enumerate(ends):
        if saved is not None and saved > newest:
            count, newest = 0, saved
        elif index and _counts(reason, gained):  # the first attempt is not a restart
            count += 1
    return count


def _same_error_again(earlier: Sequence[Attempt], outcome: AttemptOutcome) -> bool:
    if outcome.error is None:
        return False
    failures = [attempt for attempt in earlier if attempt.error is not None]
    return bool(failures) and (failures[-1].error, failures[-1].iteration) == (outcome.error, outcome.iteration)


def table() -> str:
    """The table in Markdown, as docs/slurm.md prints it."""
    lines = [
        "| reason | evidence | action | counts as a restart | node is excluded | exit code of the job |",
        "|---|---|---|---|---|---|",
    ]
    for rule in POLICY:
        counted = {None: "if no iteration was added", True: "yes", False: "no"}[rule.counted]
        avoided = {None: "", 1: "at once", 2: "after its second failure"}[rule.exclude_after]
        counted = counted if rule.action is Action.REQUEUE else ""
        lines.append(f"| {rule.reason} | {rule.sign} | {rule.action} | {counted} | {avoided} | {rule.exit_code} |")
    return "\n".join(lines)
