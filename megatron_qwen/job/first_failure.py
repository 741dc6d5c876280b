"""The first failure of an attempt, read from what srun, the ranks and the counters of the nodes say."""

import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_qwen.errors import EXIT_LOST_PEER
from megatron_qwen.job.ranks import ranks_of_line
from megatron_qwen.job.verdict import CONSEQUENCES, AttemptVerdict, Evidence, is_of_files
from megatron_qwen.resilience.evidence import FailureEvidence, Sign
from megatron_qwen.resilience.rules import Reason

# As Slurm 21.08 to 24.05 print them; a step's line names no node.
_OOM_STEP = re.compile(r"[Dd]etected \d+ oom[-_ ]kill event")
_OOM_TASK = re.compile(r"srun: error: \S+: tasks? [\d,-]+: Out Of Memory")
_FIRST_KILLED = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?:Killed|Out Of Memory)", re.M)
# How NCCL names the other end: "Connection closed by remote peer n3<45678>".
_PEER = re.compile(r"remote peer (?P<node>[\w.-]+)<")
MEMORY_FOUND, LINK_FOUND = "out-of-memory kill", "link_"
# slurmstepd writes a line or two at the end of the log of a task that it reports.
_TAIL_BYTES = 2000


def words_of(logs: Path, evidence: Evidence) -> str:
    """What srun printed, and the last lines of the first rank that it reports, into which slurmstepd writes too."""
    first = next(iter(evidence.tasks), None)
    paths = [logs / "srun.log", *([logs / f"rank_{first.rank}.log"] if first is not None else [])]
    return "\n".join(_tail(path) for path in paths)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0 if path.name == "srun.log" else max(0, size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def first_failure(
    evidence: Evidence, verdict: AttemptVerdict, *, said: str, seconds: float | None, found: Mapping[str, Sequence[str]]
) -> FailureEvidence | None:
    """What is known of the first failure; None where the attempt did not fail.

    Args:
        evidence: that the verdict was judged from.
        verdict: on the attempt.
        said: what srun printed, and the last lines of the rank that was killed.
        seconds: from the start of the ranks to their end.
        found: what the counters of the nodes say, by node.
    """
    if verdict.reason is Reason.LOST_NODE:
        return FailureEvidence(Sign.DOWN, node=next(iter(verdict.failed_nodes), None), seconds=seconds)
    if verdict.reason is Reason.ERROR:
        return _of_an_error(evidence, seconds, found)
    if verdict.reason is not Reason.LOST_PEER:
        return None
    broken = next((end for end in evidence.ends if end.hardware), None)
    if broken is not None:
        node = evidence.nodes.get(broken.rank)
        return FailureEvidence(
            Sign.HARDWARE, broken.rank, node, exit_code=broken.exit_code, seconds=seconds, found=_of(found, node)
        )
    told = next((end for end in evidence.ends if is_of_files(end)), None)
    if told is not None:
        node = evidence.nodes.get(told.rank)
        return FailureEvidence(Sign.FILES, told.rank, node, exit_code=told.exit_code, seconds=seconds)
    return _of_a_killed_rank(evidence, said, seconds, found) or _of_a_connection(evidence, verdict, seconds, found)


def nodes_to_blame(verdict: AttemptVerdict, found: FailureEvidence | None) -> tuple[str, ...]:
    """The nodes of a verdict; where devices have counted errors, the node of these."""
    if found is not None and found.sign is Sign.HARDWARE and found.node is not None:
        return (found.node,)
    return verdict.failed_nodes


def of_a_hang(
    odd: Sequence[int], nodes: Mapping[int, str], found: Mapping[str, Sequence[str]], *, blamed: bool
) -> FailureEvidence:
    """What is known of a hang.

    Args:
        odd: ranks whose stacks differ from the others'.
        nodes: node of every rank.
        found: what the counters of the nodes say, by node.
        blamed: whether few enough ranks differ that these are to blame.
    """
    if (broken := _broken_node(found)) is not None:
        return FailureEvidence(Sign.HARDWARE, node=broken, found=tuple(found[broken]))
    lines = tuple(f"{node}: {line}" for node in sorted(found) for line in found[node])
    if not odd and len(set(nodes.values())) > 1:
        # Every rank waits for the others at the same place: what they sent did not arrive.
        return FailureEvidence(Sign.CONNECTION, found=lines)
    only = odd[0] if len(odd) == 1 and blamed else None
    return FailureEvidence(Sign.HUNG, only, None if only is None else nodes[only], found=lines)


def _broken_node(found: Mapping[str, Sequence[str]]) -> str | None:
    """The one node whose devices have counted errors; None if there is none, or more than one."""
    broken = [node for node, lines in found.items() if _of_devices(lines)]
    return broken[0] if len(broken) == 1 else None


def _of_devices(lines: Sequence[str]) -> list[str]:
    """Lines about GPUs: memory may be the program's, and links that recover kill no process."""
    return [line for line in lines if MEMORY_FOUND not in line and LINK_FOUND not in line]


def _of(found: Mapping[str, Sequence[str]], node: str | None) -> tuple[str, ...]:
    return tuple(found.get(node, ())) if node is not None else ()


def _of_an_error(
    evidence: Evidence, seconds: float | None, found: Mapping[str, Sequence[str]]
) -> FailureEvidence | None:
    error = next((end for end in evidence.ends if end.error and end.exit_code != EXIT_LOST_PEER), None)
    task = next(iter(evidence.tasks), None)
    rank = error.rank if error is not None else task.rank if task is not None else None
    if rank is None:
        return None
    code = error.exit_code if error is not None else task.code if task is not None else None
    node = evidence.nodes.get(rank)
    lines = _of(found, node)
    sign = Sign.HARDWARE if _of_devices(lines) else Sign.ERROR
    return FailureEvidence(sign, rank, node, exit_code=code, seconds=seconds, found=lines)


def _of_a_killed_rank(
    evidence: Evidence, said: str, seconds: float | None, found: Mapping[str, Sequence[str]]
) -> FailureEvidence | None:
    reported = {end.rank for end in evidence.ends}
    killed = [task for task in evidence.tasks if task.code < 0 and task.code not in CONSEQUENCES]
    first = next((task for task in killed if task.rank not in reported), None)
    if first is None:
        return None
    lines = _of(found, first.node)
    name = signal.Signals(-first.code).name
    out_of_memory = name == "SIGKILL" and (
        _OOM_TASK.search(said) or _OOM_STEP.search(said) or any(MEMORY_FOUND in line for line in lines)
    )
    sign = Sign.MEMORY if out_of_memory else Sign.HARDWARE if _of_devices(lines) else Sign.KILLED
    # All ranks of one node of several, killed at one stroke: that says nothing about the lowest of them.
    own = {rank for rank, node in evidence.nodes.items() if node == first.node}
    together = set(_killed_together(said))
    of_node = len(own) > 1 and own <= together and len(set(evidence.nodes.values())) > 1
    rank = None if of_node and not out_of_memory else first.rank
    return FailureEvidence(sign, rank, first.node, name, seconds=seconds, found=lines)


def _killed_together(said: str) -> list[int]:
    """Ranks in srun's first line about killed ones."""
    match = _FIRST_KILLED.search(said)
    return ranks_of_line(match["tasks"]) if match else []


def _of_a_connection(
    evidence: Evidence, verdict: AttemptVerdict, seconds: float | None, found: Mapping[str, Sequence[str]]
) -> FailureEvidence:
    """A lost connection without a dead process: the rank that noticed first, and the other end if it named one."""
    lines = tuple(f"{node}: {line}" for node in sorted(found) for line in found[node])
    if (broken := _broken_node(found)) is not None:
        return FailureEvidence(Sign.HARDWARE, node=broken, seconds=seconds, found=lines)
    lost = next((end for end in evidence.ends if end.exit_code == EXIT_LOST_PEER), None)
    if lost is None:
        return FailureEvidence(Sign.CONNECTION, seconds=seconds, found=lines)
    node = evidence.nodes.get(lost.rank)
    linked = [node for node, said in found.items() if any(LINK_FOUND in line for line in said)]
    known = set(evidence.nodes.values())
    named = [name for name in _PEER.findall(lost.message) if name in known]
    others = [*named, *verdict.failed_nodes]
    ends = tuple(dict.fromkeys([node, *others])) if node is not None and others else ()
    if len(linked) == 1:  # that end, whoever noticed it
        ends = tuple(linked)
    return FailureEvidence(
        Sign.CONNECTION, lost.rank, node, exit_code=lost.exit_code, seconds=seconds, ends=ends, found=lines
    )
