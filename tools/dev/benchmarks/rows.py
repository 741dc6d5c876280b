"""What a benchmark answers with: one figure of ours against a peer's or a limit, measured in the same run."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BenchmarkRow:
    """A comparison. Above 1 is better than the peer, or within the limit.

    Args:
        benchmark: what was measured.
        ours: median of our figure.
        against: median of the peer's figure, or the limit.
        unit: of both.
        peer: who the peer is, or what the limit is.
        ratio: median over the rounds.
        ratio_min: worst round.
        ratio_max: best round.
        required: least ratio that passes.
        conditions: threads, rounds and the like.
    """

    benchmark: str
    ours: float
    against: float
    unit: str
    peer: str
    ratio: float
    ratio_min: float
    ratio_max: float
    required: float
    conditions: str

    @property
    def passes(self) -> bool:
        """Whether the ratio is what is required."""
        return self.ratio >= self.required

    def __str__(self) -> str:
        return (
            f"{self.benchmark}: {self.ours:,.4g} {self.unit} against {self.against:,.4g} ({self.peer}), "
            f"ratio {self.ratio:.3f} ({self.ratio_min:.3f} to {self.ratio_max:.3f}), required {self.required:g}"
        )


def against_limit(benchmark: str, values: Sequence[float], *, limit: float, unit: str, conditions: str) -> BenchmarkRow:
    """A row for figures that must stay under a limit."""
    middle = statistics.median(values)
    ratios = [limit / value for value in values]
    return BenchmarkRow(
        benchmark, middle, limit, unit, "limit", limit / middle, min(ratios), max(ratios), 1.0, conditions
    )


def against_peer(
    benchmark: str,
    ratios: Sequence[float],
    *,
    ours: float,
    against: float,
    unit: str,
    peer: str,
    required: float,
    conditions: str,
) -> BenchmarkRow:
    """A row for figures against a peer's: the ratio is the median over rounds, with the worst and the best."""
    return BenchmarkRow(
        benchmark, ours, against, unit, peer, statistics.median(ratios), min(ratios), max(ratios), required, conditions
    )
