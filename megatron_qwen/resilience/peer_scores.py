"""Scores of ranks in one figure against their peers, window by window, and which ranks stay slow."""

import math
import statistics
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

# All chosen by hand. The excess of a slow rank is beyond the spread of its peers by this factor, ...
_NOISE_FACTOR = 4.0
# ... in more than half of the windows; each of its windows is at most this much above the threshold, ...
_MARGIN = 0.15
# ... and the excess is this share of a step at least: less is not worth an engineer's time.
_LEAST_SHARE_OF_STEP = 0.02
# A slow rank has recovered at this much above the threshold, so that one at the limit is not named again and again.
_BACK = 0.1
# A rank without independent peers is compared with itself in so many windows of its beginning.
_BASELINE_WINDOWS = 5
# The faster half of normally distributed figures has a median absolute deviation of 0.40 standard deviations.
_MAD_OF_HALF = 0.40


@dataclass(frozen=True)
class RankScore:
    """One rank in one window.

    Args:
        score: its speed as a share of its peers': what they need over what it needs; nan where that is not known.
        peers_s: what its peers need, in seconds.
        slow_windows: for how many windows it has been slow, 0 if it is not.
        recent: median of its scores over the windows that decide.
    """

    score: float
    peers_s: float
    slow_windows: int
    recent: float


class _Spread:
    """Median and spread of some figures; those that are not known are left out."""

    def __init__(self, values: Sequence[float]) -> None:
        self._sorted = sorted(value for value in values if not math.isnan(value))
        # Of the faster half, so that stragglers, up to half of all, do not count as noise.
        half = self._sorted[: (len(self._sorted) + 1) // 2]
        middle = statistics.median(half) if half else math.nan
        deviation = statistics.median(abs(value - middle) for value in half) if half else 0.0
        self.noise = deviation / _MAD_OF_HALF

    def without(self, value: float) -> float:
        """Median of the others; nan where there is none."""
        left = len(self._sorted) - 1
        if left < 1:
            return math.nan
        place = bisect_left(self._sorted, value)

        def other(index: int) -> float:
            return self._sorted[index + (index >= place)]

        return (other((left - 1) // 2) + other(left // 2)) / 2


class _History:
    """What is kept of a rank."""

    def __init__(self, windows: int) -> None:
        self.scores: deque[float] = deque(maxlen=windows)
        self.clear: deque[bool] = deque(maxlen=windows)
        self.baseline: list[float] = []
        self.low_s = 0.0
        self.slow_windows = 0


class PeerScores:
    """Compares a figure of every rank, in seconds, with that of its peers.

    Args:
        peers: of every rank a number that ranks with the same work share, such as their pipeline stage.
        nodes: of every rank its node.
        threshold: a rank is slow whose score is below this ...
        windows: ... over so many windows in a row.
        least_s: seconds that it must have been slow, too.
    """

    def __init__(
        self, peers: Sequence[int], nodes: Sequence[str], *, threshold: float, windows: int, least_s: float = 0.0
    ) -> None:
        self.threshold, self.windows, self.least_s = threshold, windows, least_s
        groups: dict[int, list[int]] = defaultdict(list)
        for rank, group in enumerate(peers):
            groups[group].append(rank)
        self._groups = list(groups.values())
        # Ranks that may all be slow together, as on a node that holds all of a pipeline stage, have no independent
        # peers: their own beginning is what they are compared with as well.
        several_nodes = len(set(nodes)) > 1
        self._lone = {
            rank
            for ranks in self._groups
            if len(ranks) == 1 or (several_nodes and len({nodes[rank] for rank in ranks}) == 1)
            for rank in ranks
        }
        self._histories = [_History(windows) for _ in nodes]
        self._work: object = None

    def add(
        self, figures: Sequence[float], *, step_s: Sequence[float], steps: int = 1, work: object = None
    ) -> list[RankScore]:
        """Scores a window.

        Args:
            figures: seconds a step of every rank; nan where one is not known.
            step_s: seconds of a whole step, by rank.
            steps: in the window.
            work: what a step consists of; own beginnings start anew where it changes.
        """
        if work != self._work:
            self._work = work
            for history in self._histories:
                history.baseline.clear()
        judged = self._among_peers(figures, step_s)
        if self._lone:
            self._with_beginning(figures, step_s, judged)
        return [
            self._after(history, *one, window_s=seconds * steps)
            for history, one, seconds in zip(self._histories, judged, step_s, strict=True)
        ]

    def _among_peers(self, figures: Sequence[float], step_s: Sequence[float]) -> list[tuple[float, float, bool]]:
        """Score, the peers' figure and whether the excess is clear, of every rank."""
        judged = [(math.nan, math.nan, False)] * len(figures)
        for ranks in self._groups:
            spread = _Spread([figures[rank] for rank in ranks])
            for rank in ranks:
                own = figures[rank]
                if math.isnan(own):
                    continue
                others = spread.without(own)
                if own > 0 and not math.isnan(others):
                    judged[rank] = (others / own, others, _is_clear(own - others, spread.noise, step_s[rank]))
        return judged

    def _with_beginning(
        self, figures: Sequence[float], step_s: Sequence[float], judged: list[tuple[float, float, bool]]
    ) -> None:
        """The lower of the two scores, for ranks without independent peers.

        A rank's ratio to its beginning is compared with the others' ratios to theirs: what all do alike cancels out.
        """
        ratios: dict[int, float] = {}
        for rank, (history, own) in enumerate(zip(self._histories, figures, strict=True)):
            if math.isnan(own):
                continue
            if len(history.baseline) < _BASELINE_WINDOWS:
                history.baseline.append(own)
            elif (beginning := statistics.median(history.baseline)) > 0 and own > 0:
                ratios[rank] = own / beginning
        spread = _Spread(list(ratios.values()))
        for rank in self._lone & ratios.keys():
            score, own = spread.without(ratios[rank]) / ratios[rank], figures[rank]
            if not math.isnan(score) and not score > judged[rank][0]:
                noise_s = spread.noise / ratios[rank] * own
                judged[rank] = (score, own * score, _is_clear(own * (1 - score), noise_s, step_s[rank]))

    def _after(self, history: _History, score: float, peers_s: float, clear: bool, *, window_s: float) -> RankScore:
        if not math.isnan(score):
            history.scores.append(score)
            history.clear.append(clear)
            recent = statistics.median(history.scores)
            lowest = self.threshold + _MARGIN
            history.low_s = history.low_s + window_s if score < lowest else 0.0
            if history.slow_windows:
                slow = recent < min(self.threshold + _BACK, 1.0)
            else:
                slow = (
                    len(history.scores) == self.windows
                    and recent < self.threshold
                    and max(history.scores) < lowest
                    and 2 * sum(history.clear) > self.windows
                    and history.low_s >= self.least_s
                )
            before = history.slow_windows or self.windows - 1
            history.slow_windows = before + 1 if slow else 0
        recent = statistics.median(history.scores) if history.scores else math.nan
        return RankScore(score, peers_s, history.slow_windows, recent)


def _is_clear(excess_s: float, noise_s: float, step_s: float) -> bool:
    return excess_s > _NOISE_FACTOR * noise_s and excess_s >= _LEAST_SHARE_OF_STEP * step_s
