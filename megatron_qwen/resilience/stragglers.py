"""Which ranks are slower than their peers, from the times that all ranks measured over a window of steps.

Ranks of a step wait for one another, so the time of a step is the same on all. What is compared is the time that a rank
needs by itself, without its waits for others.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_qwen.resilience.peer_scores import PeerScores, RankScore

# Where other programs take a rank's cores, that has to last: a package update is over in a minute. Chosen by hand.
_CORES_TAKEN_S = 60.0
_CAUSES = {
    "compute": "compute",
    "data": "waits for data",
    "host": "work between steps",
    "cores": "other programs run on its cores",
}


class RankTimes(NamedTuple):
    """Medians over the steps of a window on one rank, in seconds a step; nan where a rank has no figure.

    Args:
        compute: the rank's own work in a step.
        data: wait for batches.
        host: the rank's own work between steps; of rank 0 without its callbacks, which write the metrics.
        cores: ready to run while other programs had the rank's cores.
        communication: wait for other ranks.
        step: the whole step.
    """

    compute: float
    data: float
    host: float
    cores: float
    communication: float
    step: float

    @property
    def own(self) -> float:
        """What the rank needs by itself, given its cores."""
        return self.compute + self.data + self.host


@dataclass(frozen=True)
class Straggler:
    """A rank that its peers wait for.

    Args:
        rank: which.
        node: where it runs.
        score: its speed as a share of its peers', over the windows that decide.
        windows: for how many windows it has been slow.
        cause: compute, data, host or cores: where most of its excess is.
        own_s: what it needs by itself for a step, in seconds.
        peers_s: what its peers need.
    """

    rank: int
    node: str
    score: float
    windows: int
    cause: str
    own_s: float
    peers_s: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.node} is slow: {self.score:.2f} of its peers' speed for {self.windows} windows "
            f"({_CAUSES[self.cause]}; {self.own_s:.3g} s a step by itself, its peers {self.peers_s:.3g} s)"
        )


@dataclass(frozen=True)
class WindowScores:
    """What a window says.

    Args:
        scores: of every rank its speed as a share of its peers'; nan where that is not known.
        stragglers: the ranks that are slow, slowest first.
        nodes: nodes of which most ranks are slow, of those with several.
        back: ranks that are not slow any more.
        named: those of ``stragglers`` that were not slow in the window before.
    """

    scores: tuple[float, ...]
    stragglers: tuple[Straggler, ...] = ()
    nodes: tuple[str, ...] = ()
    back: tuple[int, ...] = ()
    named: tuple[Straggler, ...] = ()


class StragglerScoring:
    """Scores ranks window by window.

    Args:
        peers: of every rank a number that ranks with the same work share, such as their pipeline stage.
        nodes: of every rank its node.
        threshold: a rank is slow whose speed is below this share of its peers' ...
        windows: ... over so many windows in a row.
    """

    def __init__(self, peers: Sequence[int], nodes: Sequence[str], *, threshold: float, windows: int) -> None:
        self.peers, self.nodes = tuple(peers), tuple(nodes)
        self._own = PeerScores(peers, nodes, threshold=threshold, windows=windows)
        self._with_cores = PeerScores(peers, nodes, threshold=threshold, windows=windows, least_s=_CORES_TAKEN_S)
        self._slow: frozenset[int] = frozenset()

    def add(self, times: Sequence[RankTimes], *, steps: int, work: object = None) -> WindowScores:
        """Scores a window.

        Args:
            times: of every rank.
            steps: in the window.
            work: what a step consists of (batch size, sequence length): ranks without peers are compared with their
                own earlier windows of the same work.
        """
        step_s = [one.step for one in times]
        own = self._own.add([one.own for one in times], step_s=step_s, steps=steps, work=work)
        whole = self._with_cores.add([one.own + one.cores for one in times], step_s=step_s, steps=steps, work=work)
        found = []
        for rank, (alone, crowded) in enumerate(zip(own, whole, strict=True)):
            if alone.slow_windows:
                found.append(self._straggler(rank, times, alone, self._cause(rank, times)))
            elif crowded.slow_windows:
                found.append(self._straggler(rank, times, crowded, "cores"))
        found.sort(key=lambda one: one.score)
        slow = frozenset(one.rank for one in found)
        before, self._slow = self._slow, slow
        named = tuple(one for one in found if one.rank not in before)
        scores = tuple(one.score for one in own)
        return WindowScores(scores, tuple(found), self._slow_nodes(slow), tuple(sorted(before - slow)), named)

    def _straggler(self, rank: int, times: Sequence[RankTimes], score: RankScore, cause: str) -> Straggler:
        own_s = times[rank].own + (times[rank].cores if cause == "cores" else 0.0)
        return Straggler(rank, self.nodes[rank], score.recent, score.slow_windows, cause, own_s, score.peers_s)

    def _cause(self, rank: int, times: Sequence[RankTimes]) -> str:
        """The part of its time that exceeds the peers' most."""
        others = [one for other, one in enumerate(times) if self.peers[other] == self.peers[rank] and other != rank]

        def excess(part: str) -> float:
            usual = [value for one in others if not math.isnan(value := float(getattr(one, part)))]
            return float(getattr(times[rank], part)) - (statistics.median(usual) if usual else 0.0)

        return max(("compute", "data", "host"), key=excess)

    def _slow_nodes(self, slow: Collection[int]) -> tuple[str, ...]:
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for rank, node in enumerate(self.nodes):
            counts[node][0] += 1
            counts[node][1] += rank in slow
        if len(counts) == 1:
            return ()
        return tuple(node for node, (ranks, bad) in counts.items() if ranks > 1 and 2 * bad > ranks)
