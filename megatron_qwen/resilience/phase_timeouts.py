"""How long a phase of a run may last before the run counts as hung: a number of the user, or learnt from the run.

Phases: ``starting`` (set-up and the first step, which compiles), ``training`` (a step), ``saving``, ``validating``,
``evaluating`` and ``finishing``. A learnt timeout may end a hung run early, and must not end a slow one. So it begins
at a long one, and is shortened only when the run has shown how long the phase takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

STARTING, TRAINING = "starting", "training"
# Chosen by hand, like everything below: the timeouts of versions that learnt nothing.
_START_S, _STEP_S = 1800.0, 900.0
# A phase that happens for the first time may create directories, fill caches and compile.
_FIRST_S = 1800.0
# Above the longest timeouts, for runs whose steps or saves take a quarter of an hour and more.
_SLOW_FACTOR = 3.0


@dataclass(frozen=True)
class LearningRule:
    """When a phase counts as known, and what its timeout is then.

    Args:
        samples: how often it must have been seen in this attempt.
        factor: the timeout is so many times the longest that was seen,
        shortest_s: and not shorter than this. A server of a shared file system takes minutes to fail over.
    """

    samples: int
    factor: float
    shortest_s: float


_RULES = {
    # Of earlier attempts: this one's set-up is over when it is known. Those may have loaded nothing, from warm caches,
    # so nothing is shortened.
    STARTING: LearningRule(samples=0, factor=_SLOW_FACTOR, shortest_s=_START_S),
    TRAINING: LearningRule(samples=20, factor=20.0, shortest_s=600.0),
}
# Background saves show how long it takes to copy the tensors; one that waits for the file system takes much longer.
_OTHERS = LearningRule(samples=2, factor=_SLOW_FACTOR, shortest_s=_STEP_S)


@dataclass(frozen=True)
class PhaseTimes:
    """How long phases have taken.

    Args:
        longest_s: the longest of each phase, in seconds; also of earlier attempts with as many ranks.
        counts: how often each was seen in this attempt.
    """

    longest_s: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def with_one(self, phase: str, seconds: float) -> "PhaseTimes":
        """One more of a phase."""
        longest = {**self.longest_s, phase: max(seconds, self.longest_s.get(phase, 0.0))}
        return PhaseTimes(longest, {**self.counts, phase: self.counts.get(phase, 0) + 1})

    def without_count(self, phase: str) -> "PhaseTimes":
        """The phase has to show again how long it takes: what it does has changed."""
        return PhaseTimes(self.longest_s, {**self.counts, phase: 0})


@dataclass(frozen=True)
class PhaseTimeouts:
    """The timeout of every phase.

    Args:
        start_s: of ``starting``; None learns it.
        step_s: of every other phase; None learns it.
    """

    start_s: float | None = None
    step_s: float | None = None

    def of(self, phase: str, times: PhaseTimes) -> float:
        """Seconds that a phase may last."""
        fixed = self.start_s if phase == STARTING else self.step_s
        if fixed is not None:
            return fixed
        longest, rule = times.longest_s.get(phase), _RULES.get(phase, _OTHERS)
        most = _START_S if phase == STARTING else _STEP_S
        if longest is None or times.counts.get(phase, 0) < rule.samples:
            return self._unknown(phase, times)
        return max(_SLOW_FACTOR * longest, min(most, max(rule.shortest_s, rule.factor * longest)))

    def _unknown(self, phase: str, times: PhaseTimes) -> float:
        """The timeout of a phase that has not shown yet how long it takes."""
        longest = times.longest_s.get(phase, 0.0)
        if phase == TRAINING:
            # A step is not longer than the set-up, which had one in it.
            return max(_STEP_S, _SLOW_FACTOR * max(longest, times.longest_s.get(STARTING, 0.0)))
        return max(_START_S if phase == STARTING else _FIRST_S, _SLOW_FACTOR * longest)
