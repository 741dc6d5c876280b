"""A rank is named where a majority speaks against it, and only there."""

import itertools

import pytest

from megatron_qwen.resilience.replicas import Disagreement, disagreement, disagreements, faulty_after_shift


def test_equal_replicas_say_nothing():
    assert disagreement({0: 5, 3: 5}) is None
    assert disagreement({2: 5}) is None
    assert disagreements(["a", "b", "a"], [1, 2, 1]) == []


@pytest.mark.parametrize("odd", range(3))
def test_the_minority_is_named(odd):
    values = {rank: 9 if rank == odd else 7 for rank in range(3)}
    assert disagreement(values) == Disagreement((0, 1, 2), (odd,))


def test_nobody_is_named_without_a_majority():
    assert disagreement({0: 1, 1: 2}) == Disagreement((0, 1), ())
    assert disagreement({0: 1, 1: 1, 2: 2, 3: 2}) == Disagreement((0, 1, 2, 3), ())
    assert disagreement({0: 1, 1: 2, 2: 3}) == Disagreement((0, 1, 2), ())


def test_groups_are_compared_apart():
    # Two tensor-parallel ranks, three replicas of each: ranks 0, 2, 4 and 1, 3, 5.
    assert disagreements([0, 1] * 3, [7, 8, 7, 9, 7, 8]) == [Disagreement((1, 3, 5), (3,))]


@pytest.mark.parametrize("size", [3, 4, 8])
def test_one_faulty_rank_is_found_from_shifted_slices(size):
    for faulty in range(size):
        # Rank r computes slice r, then slice r + 1: slice i has the results of ranks i and i - 1.
        differs = [(index == faulty) != ((index - 1) % size == faulty) for index in range(size)]
        assert faulty_after_shift(differs) == (faulty,)


def test_a_single_slice_that_differs_names_nobody():
    assert faulty_after_shift([False, True, False, False]) == ()
    assert faulty_after_shift([False] * 4) == ()
    # With two ranks both have computed both.
    assert faulty_after_shift([True, True]) == (0, 1)


def test_every_named_rank_explains_two_slices():
    for differs in itertools.product([False, True], repeat=5):
        for rank in faulty_after_shift(differs):
            assert differs[rank]
            assert differs[(rank + 1) % 5]
