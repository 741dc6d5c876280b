"""Whose fault the failures of a run are: the program's, a node's, the storage's or the network's.

A failure alone says little. What tells is what several have in common: a program takes its fault along to other nodes,
a node keeps its fault whichever rank it is given. So failures are explained by as few causes as possible.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_qwen.resilience.evidence import FailureEvidence, Sign
from megatron_qwen.resilience.rules import RULES, Reason

# Intervals between the start of the ranks and a death are alike if they differ by no more than this share, or by two
# steps. By chance two intervals do so in one of ten cases, and three, at the wider share, in one of seven. An interval
# of fewer than five steps tells nothing: a broken device may fail at the first load. Chosen by hand.
_ALIKE_OF_TWO, _ALIKE_OF_MORE, _SLACK_STEPS, _FEWEST_STEPS = 0.10, 0.25, 2, 5
# Starts of large runs take minutes and vary. Only attempts of ten minutes and more are compared by seconds.
_FEWEST_S = 600.0
# Ranks that run out of memory are the program's fault unless they are all on one node and would be so by chance in
# fewer than one of a hundred cases.
_CHANCE_OF_MEMORY = 0.01
# And a node is the common end of lost connections only if it would be so by chance in fewer than one of seven.
_CHANCE_OF_AN_END = 0.15
_OF_A_RANK = (Sign.KILLED, Sign.MEMORY, Sign.HUNG)


class Fault(StrEnum):
    """What is at fault."""

    PROGRAM = "program"
    NODE = "node"
    STORAGE = "storage"
    NETWORK = "network"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Failure:
    """One attempt that failed.

    Args:
        reason: row of the policy's table.
        nodes: that its verdict blames.
        evidence: of its first failure; None where an older version kept none.
        gained: iterations since its start.
        job_nodes: nodes of its job.
    """

    reason: Reason
    nodes: tuple[str, ...] = ()
    evidence: FailureEvidence | None = None
    gained: int = 0
    job_nodes: int = 1

    @property
    def sign(self) -> Sign | None:
        """How it showed."""
        return None if self.evidence is None else self.evidence.sign

    @property
    def rank(self) -> int | None:
        """The rank that died or hung; None where the failure is not one of a rank."""
        return self.evidence.rank if self.evidence is not None and self.evidence.sign in _OF_A_RANK else None

    @property
    def places(self) -> tuple[str, ...]:
        """Where it happened."""
        node = None if self.evidence is None else self.evidence.node
        return self.nodes or (() if node is None else (node,))


@dataclass(frozen=True)
class Blame:
    """Whose fault the newest failure is.

    Args:
        fault: the kind.
        why: what several failures have in common, and advice; empty where the newest stands alone.
        avoid: nodes that the failures together are the fault of.
        cleared: nodes on which only faults of the program or the storage happened: nothing speaks against them.
        doubtful: those of ``avoid`` on which one and the same rank failed each time. Restarts on the same nodes put it
            there again, so it may be the program's; leaving the node moves the rank, and tells.
    """

    fault: Fault
    why: str = ""
    avoid: tuple[str, ...] = ()
    cleared: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Cause:
    fault: Fault
    failures: frozenset[int]
    why: str = ""
    avoid: tuple[str, ...] = ()
    of_one_rank: bool = False


def weigh(failures: Sequence[Failure]) -> Blame:
    """Explains the failures of a run together.

    Args:
        failures: oldest first; the last is the one that is asked about.
    """
    causes = [*_certain(failures), *_of_memory(failures), *_of_files(failures), *_of_connections(failures)]
    explained = frozenset[int]().union(*(cause.failures for cause in causes))
    causes += _of_ranks_and_nodes(failures, frozenset(range(len(failures))) - explained)
    avoid = {node for cause in causes for node in cause.avoid}
    elsewhere = [cause for cause in causes if cause.fault in (Fault.PROGRAM, Fault.STORAGE)]
    sure = {node for cause in causes if not cause.of_one_rank for node in cause.avoid}
    cleared = {node for cause in elsewhere for index in cause.failures for node in failures[index].places}
    alone = _Cause(Fault.UNKNOWN, frozenset())
    newest = next((cause for cause in causes if len(failures) - 1 in cause.failures), alone)
    found = (tuple(sorted(nodes)) for nodes in (avoid, cleared - avoid, avoid - sure))
    return Blame(newest.fault, newest.why, *found)


def _certain(failures: Sequence[Failure]) -> list[_Cause]:
    """Causes that one failure tells for certain. A node that is down may be back, so it is not to be avoided yet."""
    causes = []
    for index, failure in enumerate(failures):
        only = frozenset({index})
        if failure.reason is Reason.STORAGE:
            causes.append(_Cause(Fault.STORAGE, only))
        elif failure.nodes and (RULES[failure.reason].exclude_after == 1 or failure.sign is Sign.HARDWARE):
            causes.append(_Cause(Fault.NODE, only, avoid=failure.nodes))
        elif failure.reason is Reason.ERROR:
            causes.append(_Cause(Fault.PROGRAM, only))
    return causes


def _of_memory(failures: Sequence[Failure]) -> list[_Cause]:
    """Ranks that were killed because memory ran out."""
    found = [index for index, failure in enumerate(failures) if failure.sign is Sign.MEMORY]
    if not found:
        return []
    nodes = sorted({node for index in found for node in failures[index].places})
    ranks = _ranks(failures, found)
    counting = [index for index in found if failures[index].nodes]  # too long ago for the others, or lifted
    own = _ranks(failures, counting)
    chance = min((1 / max(1, failures[index].job_nodes)) ** (len(counting) - 1) for index in found)
    if len(nodes) == 1 and len(own) > 1 and chance < _CHANCE_OF_MEMORY:
        why = f"ranks {_listed(own)} ran out of memory, all of them on {nodes[0]}: something else uses its memory"
        return [_Cause(Fault.NODE, frozenset(found), why, tuple(nodes))]
    times = f", {len(found)} times" if len(found) > 1 else ""
    who = f"rank {_listed(ranks)}" if len(ranks) == 1 else f"ranks {_listed(ranks)}"
    why = (
        f"the program is suspected: {who} ran out of host memory on {_listed(nodes)}{times}; use less host memory "
        "(data loader workers, offloading) or ask for more (memory_per_rank_gib of the cluster file)"
    )
    return [_Cause(Fault.PROGRAM, frozenset(found), why)]


def _ranks(failures: Sequence[Failure], which: Iterable[int]) -> list[int]:
    return sorted({rank for index in which if (rank := failures[index].rank) is not None})


def _of_files(failures: Sequence[Failure]) -> list[_Cause]:
    """A node whose file systems fail; the storage itself where that happens on several nodes."""
    found = frozenset(index for index, failure in enumerate(failures) if failure.sign is Sign.FILES)
    nodes = sorted({node for index in found for node in failures[index].nodes})
    if len(nodes) > 1:
        return [_Cause(Fault.STORAGE, found, f"file systems failed on {_listed(nodes)}: the storage is suspected")]
    times = sum(bool(failures[index].nodes) for index in found)
    avoid = tuple(nodes) if times > 1 else ()
    why = f"the file systems of {nodes[0]} failed {times} times" if avoid else ""
    return [_Cause(Fault.NODE, found, why, avoid)] if found else []


def _of_connections(failures: Sequence[Failure]) -> list[_Cause]:
    """Lost connections without a dead process: a node is to blame only as the one end that several of them share."""
    found = [index for index, failure in enumerate(failures) if failure.sign is Sign.CONNECTION]
    # Where one node alone said nothing, it is counted like other failures of that node. Of two nodes both are an end.
    found = [index for index in found if not failures[index].nodes or failures[index].job_nodes < 3]
    ends = [set(_ends(failures[index])) for index in found]
    counts = {node: sum(node in known for known in ends) for known in ends for node in known}
    most = max(counts.values(), default=0)
    shared = [node for node, count in counts.items() if count == most]
    # Where the counters of one link have moved, that is the end, and chance has no part in it.
    counted = len(shared) == 1 and all(len(known) == 1 for known in ends if shared[0] in known)
    # The first connection has two ends; each further one has a given node as an end in 2 of N cases.
    chance = 2 * (2 / max(2, *(failures[index].job_nodes for index in found))) ** (most - 1) if found else 1.0
    avoid = (shared[0],) if len(shared) == 1 and most > 1 and (counted or chance < _CHANCE_OF_AN_END) else ()
    why = f"{avoid[0]} is at one end of {most} lost connections" if avoid else ""
    if not avoid and len(found) > 1:
        why = f"{len(found)} lost connections without a dead process or one node in common: the network is suspected"
    return [_Cause(Fault.NETWORK, frozenset(found), why, avoid)] if found else []


def _ends(failure: Failure) -> tuple[str, ...]:
    return () if failure.evidence is None else failure.evidence.ends


def _of_ranks_and_nodes(failures: Sequence[Failure], left: frozenset[int]) -> list[_Cause]:
    """Explains deaths by the rank or by the node that explains the most of them, then the rest in the same way."""
    causes: list[_Cause] = []
    while left:
        candidates = [*_rank_candidates(failures, left), *_node_candidates(failures, left)]
        if not candidates:
            return [*causes, *_single(failures, left)]
        # Where both explain as much the program is suspected: no healthy node is to be avoided for its fault.
        best = max(candidates, key=lambda cause: (len(cause.failures), cause.fault is Fault.PROGRAM))
        causes.append(best)
        left -= best.failures
    return causes


def _rank_candidates(failures: Sequence[Failure], left: frozenset[int]) -> list[_Cause]:
    found = []
    for rank in sorted({rank for index in left if (rank := failures[index].rank) is not None}):
        own = sorted(index for index in left if failures[index].rank == rank)
        nodes = list(dict.fromkeys(node for index in own for node in failures[index].places))
        if len(own) < 2:
            continue
        if len(nodes) > 1:
            where = f"on {_listed(nodes)}"
        elif _alike([failures[index] for index in own]):
            steps = _listed([failures[index].gained for index in own])
            where = f"on {_listed(nodes)} after like intervals ({steps} iterations)"
        else:
            continue
        how = _how(failures[own[-1]])
        why = f"the program is suspected: rank {rank} {how} {len(own)} times {where}; {_advice(failures[own[-1]])}"
        found.append(_Cause(Fault.PROGRAM, frozenset(own), why))
    return found


def _node_candidates(failures: Sequence[Failure], left: frozenset[int]) -> list[_Cause]:
    limit = RULES[Reason.LOST_NODE].exclude_after or 1
    found = []
    for node in sorted({node for index in left for node in failures[index].nodes}):
        own = frozenset(index for index in left if node in failures[index].nodes)
        if len(own) >= limit:
            ranks = _ranks(failures, own)
            who = f" (rank{'s' * (len(ranks) > 1)} {_listed(ranks)})" if ranks else ""
            alone = len(ranks) == 1 and all(failures[index].rank is not None for index in own)
            found.append(_Cause(Fault.NODE, own, f"{node} has failed {len(own)} times{who}", (node,), alone))
    return found


def _single(failures: Sequence[Failure], left: frozenset[int]) -> list[_Cause]:
    """Failures that have nothing in common with others."""
    ranks = frozenset(index for index in left if failures[index].rank is not None)
    nodes = list(dict.fromkeys(node for index in sorted(ranks) for node in failures[index].places))
    of_network = {index for index in left if failures[index].sign is Sign.CONNECTION}
    causes = [
        _Cause(Fault.NETWORK if index in of_network else Fault.NODE, frozenset({index}))
        for index in left - ranks
        if failures[index].nodes
    ]
    if len(nodes) > 2:
        why = f"the program is suspected: ranks died on {_listed(nodes)}, and no node or rank twice"
        return [*causes, _Cause(Fault.PROGRAM, ranks, why)]
    return causes


def _alike(failures: Sequence[Failure]) -> bool:
    """Whether the intervals from the start to the death are alike, in iterations or in seconds."""
    share = _ALIKE_OF_TWO if len(failures) == 2 else _ALIKE_OF_MORE
    steps = [failure.gained for failure in failures]
    if min(steps) >= _FEWEST_STEPS and max(steps) - min(steps) <= max(_SLACK_STEPS, share * max(steps)):
        return True
    known = [failure.evidence.seconds for failure in failures if failure.evidence is not None]
    seconds = [value for value in known if value is not None and value >= _FEWEST_S]
    return len(seconds) == len(failures) and max(seconds) - min(seconds) <= share * max(seconds)


def _how(failure: Failure) -> str:
    if failure.sign is Sign.HUNG:
        return "hung"
    signal = None if failure.evidence is None else failure.evidence.signal
    return f"was killed by {signal}" if signal else "died"


def _advice(failure: Failure) -> str:
    if failure.sign is Sign.HUNG:
        return "its stack is in stacks.txt of the attempt's logs"
    if failure.evidence is not None and failure.evidence.signal == "SIGKILL":
        return (
            "a rank that is killed without a word has mostly used more host memory than there is: see the memory "
            "limit of the job (memory_per_rank_gib of the cluster file) and the data loader's workers"
        )
    return "see the end of its log"


def _listed(items: Sequence[object]) -> str:
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
