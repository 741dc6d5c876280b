"""The table of what follows the end of an attempt. ``resilience.policy`` reads it.

docs/slurm.md prints it; a test compares the two.
"""

from dataclasses import dataclass
from enum import StrEnum

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
    STRAGGLER = "straggler"
    CORRUPTION = "silent corruption"
    STORAGE = "storage"
    ERROR = "error"
    CONFIGURATION = "configuration"
    DATA = "data"
    CHECKPOINT = "checkpoint"
    NUMERICS = "numerics"


class Counted(StrEnum):
    """Whether a restart counts against ``resilience.max_restarts_without_progress``."""

    ALWAYS = "yes"
    NEVER = "no"
    WITHOUT_STEPS = "if no iteration was added"
    WITH_STEPS = "if iterations were added"


class Action(StrEnum):
    """What follows an attempt."""

    NONE = "none"
    RESTART = "restart"  # inside the allocation; what REQUEUE becomes where the job need not leave its nodes
    REQUEUE = "requeue"
    STOP = "stop"


@dataclass(frozen=True)
class RequeueRule:
    """A row of the table.

    Args:
        reason: why the attempt ended.
        sign: the evidence for it.
        action: what follows.
        counted: whether a restart for this reason counts.
        exclude_after: failures of a node after which the job excludes it; None: nodes are not to blame.
        exit_code: of the job.
        in_job: whether the ranks may be started again inside the allocation instead of a requeue.
    """

    reason: Reason
    sign: str
    action: Action
    counted: Counted
    exclude_after: int | None
    exit_code: int
    in_job: bool = True


POLICY: tuple[RequeueRule, ...] = (
    RequeueRule(Reason.FINISHED, "every rank exited with code 0", Action.NONE, Counted.NEVER, None, 0),
    RequeueRule(
        Reason.PREEMPTED,
        "SIGUSR2 or SIGTERM before the time limit, whoever sent it; the ranks saved and exited with code 75",
        Action.REQUEUE,
        Counted.NEVER,
        None,
        EXIT_REQUEUE,
        in_job=False,
    ),
    RequeueRule(
        Reason.OUT_OF_TIME,
        "SIGUSR2 shortly before the time limit; the ranks saved and exited with code 75",
        Action.REQUEUE,
        Counted.WITHOUT_STEPS,
        None,
        EXIT_REQUEUE,
        in_job=False,
    ),
    RequeueRule(
        Reason.REQUEUED,
        "the job was requeued, by `scontrol requeue` or by Slurm, and no node is reported as down",
        Action.REQUEUE,
        Counted.NEVER,
        None,
        EXIT_REQUEUE,
        in_job=False,
    ),
    RequeueRule(Reason.CANCELLED, "`mq launch cancel`, `scancel`", Action.NONE, Counted.NEVER, None, EXIT_TERMINATED),
    RequeueRule(
        Reason.UNHEALTHY_NODE,
        "slurm/healthcheck.sh failed on some nodes before any rank started",
        Action.REQUEUE,
        Counted.ALWAYS,
        1,
        EXIT_LOST_PEER,
    ),
    RequeueRule(
        Reason.LOST_NODE, "Slurm reports a node of the job as down", Action.REQUEUE, Counted.ALWAYS, 2, EXIT_LOST_PEER
    ),
    RequeueRule(
        Reason.LOST_PEER,
        "a rank was killed or lost its connection while its node still answers",
        Action.REQUEUE,
        Counted.ALWAYS,
        2,
        EXIT_LOST_PEER,
    ),
    RequeueRule(
        Reason.HANG,
        "a step, save or other phase took longer than its timeout; the stacks of all ranks are in the logs",
        Action.REQUEUE,
        Counted.ALWAYS,
        2,
        EXIT_LOST_PEER,
    ),
    RequeueRule(
        Reason.STRAGGLER,
        "with `resilience.straggler_action=requeue`: a rank was slow; the ranks saved and exited with code 75",
        Action.REQUEUE,
        Counted.WITHOUT_STEPS,
        1,
        EXIT_REQUEUE,
    ),
    RequeueRule(
        Reason.CORRUPTION,
        "weights or optimizer state changed without an update, or a step gives another result when it is repeated",
        Action.REQUEUE,
        Counted.ALWAYS,
        1,
        EXIT_LOST_PEER,
    ),
    RequeueRule(
        Reason.STORAGE,
        "the file system of the run is full, over quota, read-only or does not answer",
        Action.REQUEUE,
        Counted.WITH_STEPS,
        None,
        EXIT_FAILURE,
        in_job=False,
    ),
    RequeueRule(
        Reason.ERROR,
        "an exception; if the previous error was the same at the same iteration, the run stops",
        Action.REQUEUE,
        Counted.ALWAYS,
        None,
        EXIT_FAILURE,
    ),
    RequeueRule(
        Reason.CONFIGURATION, "a rank exited with code 2", Action.STOP, Counted.NEVER, None, EXIT_DO_NOT_REQUEUE
    ),
    RequeueRule(Reason.DATA, "a rank exited with code 3", Action.STOP, Counted.NEVER, None, EXIT_DO_NOT_REQUEUE),
    RequeueRule(Reason.CHECKPOINT, "a rank exited with code 4", Action.STOP, Counted.NEVER, None, EXIT_DO_NOT_REQUEUE),
    RequeueRule(Reason.NUMERICS, "a rank exited with code 17", Action.STOP, Counted.NEVER, None, EXIT_DO_NOT_REQUEUE),
)
RULES: dict[Reason, RequeueRule] = {rule.reason: rule for rule in POLICY}


def table() -> str:
    """The table in Markdown, as docs/slurm.md prints it."""
    names = ("reason", "evidence", "action", "inside the allocation", "counts as a restart", "node is excluded")
    lines = [f"| {' | '.join(names)} | exit code of the job |", "|---|---|---|---|---|---|---|"]
    for rule in POLICY:
        avoided = {None: "", 1: "at once", 2: "after its second failure"}[rule.exclude_after]
        counted = rule.counted if rule.action is Action.REQUEUE else ""
        in_job = ("yes" if rule.in_job else "no") if rule.action is Action.REQUEUE else ""
        cells = (rule.reason, rule.sign, rule.action, in_job, counted, avoided, rule.exit_code)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
