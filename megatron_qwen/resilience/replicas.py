"""Which rank holds the odd value among values that should be equal: replicas of weights, or results of a slice of data.

No torch: the values are hashes that the ranks have exchanged.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Disagreement:
    """Replicas that are not equal.

    Args:
        ranks: all that hold a replica.
        odd: those outside the majority; empty where no value has one, as with two replicas.
    """

    ranks: tuple[int, ...]
    odd: tuple[int, ...]


def disagreement(values: Mapping[int, Hashable]) -> Disagreement | None:
    """Compares the values of replicas, by rank; None where all are equal.

    A rank is named only against a strict majority: of two different replicas either may be the wrong one.
    """
    counts = Counter(values.values())
    if len(counts) <= 1:
        return None
    value, count = counts.most_common(1)[0]
    odd = sorted(rank for rank, own in values.items() if own != value) if count * 2 > len(values) else []
    return Disagreement(tuple(sorted(values)), tuple(odd))


def disagreements(groups: Sequence[Hashable], values: Sequence[Hashable]) -> list[Disagreement]:
    """``disagreement`` within each group of ranks.

    Args:
        groups: by rank, which replica group it is in.
        values: by rank.
    """
    members: dict[Hashable, dict[int, Hashable]] = defaultdict(dict)
    for rank, (group, value) in enumerate(zip(groups, values, strict=True)):
        members[group][rank] = value
    return [found for held in members.values() if (found := disagreement(held)) is not None]


def faulty_after_shift(differs: Sequence[bool]) -> tuple[int, ...]:
    """Data-parallel ranks that explain why slices of a batch gave other results on other ranks.

    Slice i was computed by rank i and, after a shift, by rank i - 1. So rank i has computed slices i and i + 1, and a
    rank that computes wrongly makes both differ. With three ranks or more one such rank is found alone; with two, both
    fit, and the caller has to look at the sizes of the results.

    Args:
        differs: by slice, whether its two results differ.
    """
    size = len(differs)
    return tuple(rank for rank in range(size) if differs[rank] and differs[(rank + 1) % size])
