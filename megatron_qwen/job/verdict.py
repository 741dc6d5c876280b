"""Why an attempt ended: the exit codes of its ranks, what they left behind, and what the scheduler is doing."""

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
# Slurm resolves the moment of the early signal to about a minute.
_SIGNAL_SLACK_S = 75.0
# Signals by which a process is told to end, and by which NCCL's watchdog ends one whose peer is gone.
_TOLD = (-signal.SIGTERM, -signal.SIGUSR2, -signal.SIGHUP, -signal.SIGINT)
_CONSEQUENCES = (*_TOLD, -signal.SIGABRT)


@dataclass(frozen=True)
class Evidence:
    """What a controller knows when the ranks have ended.

    Args:
        exit_code: of all ranks together.
        tasks: ranks that failed, in the order in which that was noticed.
        ends: what ranks left behind, the earliest first.
        nodes: node of every rank.
        down_nodes: nodes the scheduler has lost.
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
class Verdict:
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


def judge(evidence: Evidence) -> Verdict:
    """The verdict: first what would end every attempt alike, then what the scheduler did, then who failed first."""
    if evidence.exit_code == 0:
        return Verdict(Reason.FINISHED, "every rank ended with 0")
    for end in evidence.ends:
        if end.exit_code in _STOPPING_CODES:
            where = f"rank {end.rank} on {evidence.nodes.get(end.rank, '?')}"
            return Verdict(_STOPPING_CODES[end.exit_code], f"{where}: {end.message}")
    if evidence.ending is Ending.CANCELLED:
        return Verdict(Reason.CANCELLED, "the job was cancelled")
    if evidence.down_nodes:
        named = ", ".join(evidence.down_nodes)
        return Verdict(Reason.LOST_NODE, f"Slurm reports {named} down", evidence.down_nodes)
    return _asked_to_stop(evidence) or _failed(evidence)


def _asked_to_stop(evidence: Evidence) -> Verdict | None:
    """Where the ranks saved and left because they were told to, or were ended by the scheduler before they could."""
    codes = {end.exit_code for end in evidence.ends} | {task.code for task in evidence.tasks}
    saved = EXIT_REQUEUE in codes and not any(end.error for end in evidence.ends)
    if EXIT_INTERRUPTED in codes and evidence.ending is Ending.NOTHING:
        return Verdict(Reason.CANCELLED, "interrupted by hand")
    told = bool(evidence.tasks) and all(task.code in _TOLD for task in evidence.tasks)
    if not saved and not told and evidence.ending is Ending.NOTHING:
        return None
    how = "saved and left" if saved else "ended before it had saved"
    left, near = evidence.seconds_left, evidence.signal_delay_s + _SIGNAL_SLACK_S
    if evidence.ending is Ending.PREEMPTING:
        return Verdict(Reason.PREEMPTED, f"{how} to make room for another job")
    if evidence.ending is Ending.TIMED_OUT or (evidence.ending is Ending.NOTHING and left is not None and left <= near):
        return Verdict(Reason.OUT_OF_TIME, f"{how}; the time limit was near or reached")
    if evidence.ending is Ending.REQUEUED:
        return Verdict(Reason.REQUEUED, f"{how}; Slurm has put the job back into the queue")
    return Verdict(Reason.PREEMPTED, f"{how} on a signal")


def _failed(evidence: Evidence) -> Verdict:
    """The rank that failed first, and where."""
    reported = {end.rank for end in evidence.ends}
    killed = [task for task in evidence.tasks if task.code < 0 and task.code not in _CONSEQUENCES]
    # A rank that could say nothing any more went first; those that lost it could.
    unheard = [task for task in killed if task.rank not in reported]
    broken = next((end for end in evidence.ends if end.hardware), None)
    if broken is not None:
        node = evidence.nodes.get(broken.rank, "?")
        return Verdict(Reason.LOST_PEER, f"rank {broken.rank} on {node}: {broken.message}", (node,))
    error = next((end for end in evidence.ends if end.error and end.exit_code != EXIT_LOST_PEER), None)
    if error is not None:
        where = f"rank {error.rank} on {evidence.nodes.get(error.rank, '?')}"
        return Verdict(Reason.ERROR, f"{where}: {error.message}", error=error.error)
    if unheard:
        first = unheard[0]
        how = signal.Signals(-first.code).name
        return Verdict(Reason.LOST_PEER, f"rank {first.rank} on {first.node} was ended by {how}", (first.node,))
    lost = next((end for end in evidence.ends if end.exit_code == EXIT_LOST_PEER), None)
    if lost is not None:
        silent = sorted({node for rank, node in evidence.nodes.items() if rank not in reported})
        blame = tuple(silent) if len(silent) == 1 else ()
        return Verdict(Reason.LOST_PEER, f"rank {lost.rank} lost a peer: {lost.message}", blame)
    if evidence.tasks and all(task.code in _CONSEQUENCES for task in evidence.tasks):
        return Verdict(Reason.LOST_PEER, "ranks were ended by the loss of a peer, and none says of which")
    first_task = next(iter(evidence.tasks), None)
    if first_task is None:
        return Verdict(Reason.ERROR, f"srun ended with {evidence.exit_code}", error=f"srun {evidence.exit_code}")
    detail = f"rank {first_task.rank} on {first_task.node} ended with {first_task.code}"
    return Verdict(Reason.ERROR, detail, error=f"exit {first_task.code}")
