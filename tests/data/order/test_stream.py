"""A source is an endless stream in which nothing comes twice before everything has come once."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qwen.data.order.stream import WHOLE, StreamLayout, Windows, after, from_json, segments, to_json


def positions(runs) -> list[int]:
    return [position for begin, end in runs for position in range(begin, end)]


@pytest.mark.parametrize("total", [1, 2, 7, 64, 100, 101, 127, 1000])
@pytest.mark.parametrize("block", [1, 3, 10, 64])
def test_every_epoch_of_the_stream_holds_every_token_once(total, block):
    shape = StreamLayout(total, min(block, total), total, (1, 2))
    epochs = [positions(segments(shape, WHOLE, epoch * total, (epoch + 1) * total)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    if total // block > 10:
        assert epochs[0] != epochs[1] != epochs[2]


def test_any_part_of_the_stream_is_that_part_of_it():
    shape = StreamLayout(997, 100, 400, (5, 6))
    whole = positions(segments(shape, WHOLE, 0, 3000))
    for start, stop in [(0, 1), (99, 101), (500, 1500), (996, 998), (1990, 3000)]:
        assert positions(segments(shape, WHOLE, start, stop)) == whole[start:stop]


def test_full_groups_are_a_prefix_of_the_stream():
    shape = StreamLayout(10_000, 500, 2_000, (1, 1))
    windows = Windows(shape, WHOLE, seq_length=50, ordinal=0)
    taken = [positions(windows[index]) for index in range(80)]  # two groups of 40
    assert sorted(itertools.chain(*taken)) == sorted(positions(segments(shape, WHOLE, 0, 4_000)))
    assert taken != sorted(taken)


def test_the_sizes_for_real_sources():
    small, large = StreamLayout.of(10**6, seed=1, name="a"), StreamLayout.of(10**12, seed=1, name="a")
    assert small.group == 10**6  # all of it is shuffled together
    assert large.block == 1 << 20
    assert large.windows(4096) == 64 << 8
    assert large.key != StreamLayout.of(10**12, seed=1, name="b").key


changes = st.lists(st.tuples(st.sampled_from([1, 2, 3, 5, 8, 16, 40]), st.floats(0, 1.5)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500), changes)
def test_changes_of_length_lose_and_repeat_nothing(total, block, group, changes):
    shape = StreamLayout(total, min(block, total), min(group, total), (3, 4))
    seen, pieces, taken = Counter(), WHOLE, 0
    for ordinal, (seq_length, share) in enumerate(changes):
        windows = Windows(shape, pieces, seq_length=seq_length, ordinal=ordinal)
        samples = round(share * total / seq_length)
        for index in range(samples):
            runs = windows[index]
            seen.update(positions(runs))
            taken += seq_length
            assert sum(end - begin for begin, end in runs) == seq_length
        pieces = from_json(to_json(after(shape, pieces, seq_length=seq_length, ordinal=ordinal, taken=samples)))
    # What the changes have left comes first; with it, all that was seen is a prefix of the stream.
    left = sum(piece.stop - piece.start for piece in pieces[:-1])
    rest = left + -(taken + left) % total
    seen.update(positions(segments(shape, pieces, 0, rest)))
    assert set(seen.values()) <= {(taken + rest) // total}
    assert len(seen) == (total if taken + rest else 0)
