"""Why an attempt ended: judged from exit codes, the records that ranks wrote, and the state of the job in Slurm."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qwen.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, EXIT_LOST_PEER, EXIT_NUMERICS, EXIT_REQUEUE
from megatron_qwen.job.allocation import Ending
from megatron_qwen.job.ranks import TaskEnd
from megatron_qwen.resilience.rank_end import RankEnd
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.resilience.storage import names_fault, names_full
from megatron_qwen.resilience.straggler_leave import SlowNodes

EXIT_INTERRUPTED = 130
_STOPPING_CODES = {
    EXIT_CONFIG: Reason.CONFIGURATION,
    EXIT_DATA: Reason.DATA,
    EXIT_CHECKPOINT: Reason.CHECKPOINT,
    EXIT_NUMERICS: Reason.NUMERICS,
}
_PLACE = re.compile(r"'(/[^']*)'")  # the file of an OSError, as Python prints it
_OF_FILES = (EXIT_DATA, EXIT_CHECKPOINT)
# Slurm may send the early signal up to 60 s sooner than asked (sbatch manual, --signal); some slack on top.
_SIGNAL_SLACK_S = 75.0
# Signals that ask a process to end. SIGABRT is how NCCL's watchdog ends a process whose peer is gone.
_TOLD = (-signal.SIGTERM, -signal.SIGUSR2, -signal.SIGHUP, -signal.SIGINT)
CONSEQUENCES = (*_TOLD, -signal.SIGABRT)
# Exit codes that no rank leaves with because of a signal, a stop or a lost peer.
_QUITTING = frozenset(range(1, 126)) - {EXIT_REQUEUE, EXIT_LOST_PEER}


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
        storage: what is wrong with the file system of the run, None if nothing is.
        directory: of the run.
        seconds_left: until the time limit, None without one.
        signal_delay_s: how long before the limit the early signal comes.
        slow: the nodes that the ranks left because they were slow, None if they did not.
    """

    exit_code: int
    tasks: Sequence[TaskEnd]
    ends: Sequence[RankEnd]
    nodes: dict[int, str]
    down_nodes: tuple[str, ...] = ()
    ending: Ending = Ending.NOTHING
    storage: str | None = None
    directory: str = "/"
    seconds_left: float | None = None
    signal_delay_s: float = 0.0
    slow: SlowNodes | None = None


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
    2. Silent corruption, which all ranks have agreed on.
    3. What the scheduler did: cancelled the job, lost a node.
    4. The file system of the run, which ranks may have had no way to report. What they read there is in doubt too.
    5. Whether the ranks left a slow node, or the scheduler asked the ranks to stop.
    6. The rank that failed first. Later failures are mostly consequences of the first: a rank that loses its peer fails
       as well.
    """
    if evidence.exit_code == 0:
        return AttemptVerdict(Reason.FINISHED, "every rank exited with code 0")
    for end in evidence.ends:
        doubtful = end.exit_code in _OF_FILES and (evidence.storage is not None or is_of_files(end))
        if end.exit_code in _STOPPING_CODES and not doubtful:
            where = f"rank {end.rank} on {evidence.nodes.get(end.rank, '?')}"
            return AttemptVerdict(_STOPPING_CODES[end.exit_code], f"{where}: {end.message}")
    if (corrupted := _corrupted(evidence)) is not None:
        return corrupted
    if evidence.ending is Ending.CANCELLED:
        return AttemptVerdict(Reason.CANCELLED, "the job was cancelled")
    if evidence.down_nodes:
        named = ", ".join(evidence.down_nodes)
        return AttemptVerdict(Reason.LOST_NODE, f"Slurm reports {named} down", evidence.down_nodes)
    return _of_storage(evidence) or _left_slow_nodes(evidence) or _asked_to_stop(evidence) or _failed(evidence)


def is_told(code: int) -> bool:
    """Whether a rank that ended so had been asked to."""
    return code == EXIT_REQUEUE or code in _TOLD


def _corrupted(evidence: Evidence) -> AttemptVerdict | None:
    """The verdict if the ranks found silent corruption; if it points to few ranks, their nodes are blamed."""
    end = next((end for end in evidence.ends if end.suspects is not None), None)
    if end is None:
        return None
    ranks = {rank for rank in end.suspects or () if rank in evidence.nodes}
    nodes, there = sorted({evidence.nodes[rank] for rank in ranks}), set(evidence.nodes.values())
    # As for hangs: if more than half are suspects, none can be blamed.
    few = len(ranks) * 2 <= len(evidence.nodes) and (len(there) == 1 or len(nodes) * 2 <= len(there))
    return AttemptVerdict(Reason.CORRUPTION, end.message, tuple(nodes) if few else ())


def _of_storage(evidence: Evidence) -> AttemptVerdict | None:
    """The verdict if the run's file system is at fault, or a node's access to it or to one of its own."""
    if evidence.storage is not None:
        return AttemptVerdict(Reason.STORAGE, evidence.storage)
    told = next((end for end in evidence.ends if is_of_files(end)), None)
    if told is None:
        return None
    node = evidence.nodes.get(told.rank, "?")
    detail = f"rank {told.rank} on {node}: {told.message}"
    places = _PLACE.findall(told.message)
    elsewhere = bool(places) and not any(place.startswith(evidence.directory) for place in places)
    if elsewhere or not names_full(told.message):
        # The controller writes to the run's directory without a fault, so it is that node.
        return AttemptVerdict(Reason.LOST_PEER, detail, (node,))
    return AttemptVerdict(Reason.STORAGE, detail)


def is_of_files(end: RankEnd) -> bool:
    """Whether a rank ended because a file system failed it."""
    return bool(end.error) and names_fault(end.message)


def _left_slow_nodes(evidence: Evidence) -> AttemptVerdict | None:
    """The verdict if the ranks ended by themselves to leave a slow node; a scheduler's request comes first."""
    codes = {end.exit_code for end in evidence.ends} | {task.code for task in evidence.tasks}
    if evidence.slow is None or EXIT_REQUEUE not in codes or evidence.ending is not Ending.NOTHING:
        return None
    if any(end.error for end in evidence.ends):
        return None
    return AttemptVerdict(Reason.STRAGGLER, evidence.slow.detail, evidence.slow.nodes)


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
    killed = [task for task in evidence.tasks if task.code < 0 and task.code not in CONSEQUENCES]
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
    # One that ended itself without a record, by os._exit or a library's exit, is why the others lost a peer.
    quitter = next((task for task in evidence.tasks if task.code in _QUITTING and task.rank not in reported), None)
    if quitter is not None:
        detail = f"rank {quitter.rank} on {quitter.node} exited with code {quitter.code} and said nothing"
        return AttemptVerdict(Reason.ERROR, detail, error=f"exit {quitter.code}")
    lost = next((end for end in evidence.ends if end.exit_code == EXIT_LOST_PEER), None)
    if lost is not None:
        silent = sorted({node for rank, node in evidence.nodes.items() if rank not in reported})
        blame = tuple(silent) if len(silent) == 1 else ()
        return AttemptVerdict(
            Reason.LOST_PEER, f"rank {lost.rank} lost the connection to a peer: {lost.message}", blame
        )
    if evidence.tasks and all(task.code in CONSEQUENCES for task in evidence.tasks):
        return AttemptVerdict(Reason.LOST_PEER, "all ranks ended because they lost a peer; no rank recorded which one")
    first_task = next(iter(evidence.tasks), None)
    if first_task is None:
        return AttemptVerdict(
            Reason.ERROR, f"srun exited with code {evidence.exit_code}", error=f"srun {evidence.exit_code}"
        )
    detail = f"rank {first_task.rank} on {first_task.node} exited with code {first_task.code}"
    return AttemptVerdict(Reason.ERROR, detail, error=f"exit {first_task.code}")
