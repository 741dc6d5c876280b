"""Why an attempt ended: judged from exit codes, the records that ranks wrote, and the state of the job in Slurm."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qwen.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, EXIT_LOST_PEER, EXIT_NUMERICS, EXIT_REQUEUE
from megatron_qwen.job.allocation import Ending
from megatron_qwen.job.ranks import TaskEnd
from megatron_qwen.resilience.policy import Reason
from megatron_qwen.resilience.rank_end import RankEnd

EXIT_INTERRUPTED = 130
_STOPPING_CODES = {
    EXIT_CONFIG: Reason.CONFIGURATION,
    EXIT_DATA: Reason.DATA,
    EXIT_CHECKPOINT: Reason.CHECKPOINT,
    EXIT_NUMERICS: Reason.NUMERICS,
}
# Slurm may send the early signal up to 60 s sooner than asked (sbatch manual, --signal); some slack on top.
_SIGNAL_SLACK_S = 75.0
# Signals that ask a process to end. SIGABRT is how NCCL's watchdog ends a process whose peer is gone.
_TOLD = (-signal.SIGTERM, -signal.SIGUSR2, -signal.SIGHUP, -signal.SIGINT)
_CONSEQUENCES = (*_TOLD, -signal.SIGABRT)


@dataclass(frozen=True)
class Evidence:
    """What a controller knows when the ranks have ended.

    Args:
        exit_code: of all ranks together.
        tasks: ranks that failed, in the order in which their failure was reported.
        ends: records that ranks wrote at their end, earliest first.
        nodes: node of every rank.
        down_nodes: nodes that the scheduler reports down.
        ending: what the scheduler is doing with the job.
        seconds_left: until the time limit, None without one.
        signal_delay_s: how long before the limit the early signal comes.
    """

    exit_code: int
    tasks: Sequence[TaskEnd]
    ends: Sequence[RankEnd]
    nodes: dict[int, str]
    down_nodes: tuple[str, ...] = ()
    ending: Ending = Ending.NOTHING
    seconds_left: float | None = None
    signal_delay_s: float = 0.0


@dataclass(frozen=True)
class AttemptVerdict:
    """Why an attempt ended.

    Args:
        reason: row of the policy's table.
        detail: one line.
        failed_nodes: nodes to blame.
        error: signature of an exception.
    """

    reason: Reason
    detail: str
    failed_nodes: tuple[str, ...] = ()
    error: str | None = None


def judge(evidence: Evidence) -> AttemptVerdict:
    """The verdict, from the most certain evidence to the least.

    1. An error that would end every attempt in the same way (configuration, data, checkpoint, numerics).
    2. What the scheduler did: cancelled the job, lost a node, asked it to stop.
    3. The rank that failed first. Later failures are mostly consequences of the first: a rank that loses its peer fails
       as well.
    """
    if evidence.exit_code == 0:
        return AttemptVerdict(Reason.FINISHED, "every rank exited with code 0")
    for end in evidence.ends:
        if end.exit_code in _STOPPING_CODES:
            where = f"rank {end.rank} on {evidence.nodes.get(end.rank, '?')}"
            return AttemptVerdict(_STOPPING_CODES[end.exit_code], f"{where}: {end.message}")
    if evidence.ending is Ending.CANCELLED:
        return AttemptVerdict(Reason.CANCELLED, "the job was cancelled")
    if evidence.down_nodes:
        named = ", ".join(evidence.down_nodes)
        return AttemptVerdict(Reason.LOST_NODE, f"Slurm reports {named} down", evidence.down_nodes)
    return _asked_to_stop(evidence) or _failed(evidence)


def _asked_to_stop(evidence: Evidence) -> AttemptVerdict | None:
    """The verdict if the ranks were asked to stop, whether or not they saved a checkpoint; None if nobody asked."""
    codes = {end.exit_code for end in evidence.ends} | {task.code for task in evidence.tasks}
    saved = EXIT_REQUEUE in codes and not any(end.error for end in evidence.ends)
    if EXIT_INTERRUPTED in codes and evidence.ending is Ending.NOTHING:
        return AttemptVerdict(Reason.CANCELLED, "interrupted by the user (Ctrl-C)")
    told = bool(evidence.tasks) and all(task.code in _TOLD for task in evidence.tasks)
    if not saved and not told and evidence.ending is Ending.NOTHING:
        return None
    how = "a checkpoint was saved" if saved else "ended before a checkpoint was saved"
    left, near = evidence.seconds_left, evidence.signal_delay_s + _SIGNAL_SLACK_S
    if evidence.ending is Ending.PREEMPTING:
        return AttemptVerdict(Reason.PREEMPTED, f"preempted by another job; {how}")
    if evidence.ending is Ending.TIMED_OUT or (evidence.ending is Ending.NOTHING and left is not None and left <= near):
        return AttemptVerdict(Reason.OUT_OF_TIME, f"the time limit was near or reached; {how}")
    if evidence.ending is Ending.REQUEUED:
        return AttemptVerdict(Reason.REQUEUED, f"Slurm has requeued the job; {how}")
    return AttemptVerdict(Reason.PREEMPTED, f"stopped by a signal; {how}")


def _failed(evidence: Evidence) -> AttemptVerdict:
    """The rank that failed first, and where."""
    reported = {end.rank for end in evidence.ends}
    killed = [task for task in evidence.tasks if task.code < 0 and task.code not in _CONSEQUENCES]
    # A rank that was killed before it could write its record failed first: its peers noticed and had time to write.
    unheard = [task for task in killed if task.rank not in reported]
    broken = next((end for end in evidence.ends if end.hardware), None)
    if broken is not None:
        node = evidence.nodes.get(broken.rank, "?")
        return AttemptVerdict(Reason.LOST_PEER, f"rank {broken.rank} on {node}: {broken.message}", (node,))
    error = next((end for end in evidence.ends if end.error and end.exit_code != EXIT_LOST_PEER), None)
    if error is not None:
        where = f"rank {error.rank} on {evidence.nodes.get(error.rank, '?')}"
        return AttemptVerdict(Reason.ERROR, f"{where}: {error.message}", error=error.error)
    if unheard:
        first = unheard[0]
        how = signal.Signals(-first.code).name
        return AttemptVerdict(Reason.LOST_PEER, f"rank {first.rank} on {first.node} was killed by {how}", (first.node,))
    lost = next((end for end in evidence.ends if end.exit_code == EXIT_LOST_PEER), None)
    if lost is not None:
        silent = sorted({node for rank, node in evidence.nodes.items() if rank not in reported})
        blame = tuple(silent) if len(silent) == 1 else ()
        return AttemptVerdict(
            Reason.LOST_PEER, f"rank {lost.rank} lost the connection to a peer: {lost.message}", blame
        )
    if evidence.tasks and all(task.code in _CONSEQUENCES for task in evidence.tasks):
        return AttemptVerdict(Reason.LOST_PEER, "all ranks ended because they lost a peer; no rank recorded which one")
    first_task = next(iter(evidence.tasks), None)
    if first_task is None:
        return AttemptVerdict(
            Reason.ERROR, f"srun exited with code {evidence.exit_code}", error=f"srun {evidence.exit_code}"
        )
    detail = f"rank {first_task.rank} on {first_task.node} exited with code {first_task.code}"
    return AttemptVerdict(Reason.ERROR, detail, error=f"exit {first_task.code}")
