"""A source is an endless stream in which nothing comes twice before everything has come once."""

import itertools
import zlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qwen.data.order.permutation import KeyedPermutation
from megatron_qwen.data.order.stream import (
    WHOLE,
    StreamLayout,
    StreamRange,
    UntakenWindows,
    Windows,
    after,
    from_json,
    part,
    segments,
    to_json,
)

# Four blocks, the last one of 35 tokens; a group is two of them.
LAYOUT = StreamLayout(total=110, block=25, group=50, key=(3, 4))


def positions(runs) -> list[int]:
    return [position for begin, end in runs for position in range(begin, end)]


def by_hand(epochs: int) -> list[int]:
    """The stream of LAYOUT from its description: lists instead of arithmetic."""
    blocks = [list(range(25)), list(range(25, 50)), list(range(50, 75)), list(range(75, 110))]
    orders = [KeyedPermutation(4, 3, 4, -1, epoch) for epoch in range(epochs)]
    return [token for order in orders for visit in range(4) for token in blocks[order[visit]]]


def windows_by_hand(stream: list[int], length: int, *, ordinal: int, groups: int) -> list[list[int]]:
    """Samples of a stream: windows of a group of 50 tokens, in the order of the group's permutation."""
    count, found = 50 // length, []
    for group in range(groups):
        cut = [stream[start : start + length] for start in range(group * count * length, len(stream), length)]
        found += [cut[KeyedPermutation(count, 3, 4, ordinal, group)[index]] for index in range(count)]
    return found


def test_the_stream_is_blocks_in_the_order_of_each_epoch():
    whole = by_hand(3)
    assert positions(segments(LAYOUT, WHOLE, 0, 330)) == whole
    for start in range(0, 330, 7):
        assert positions(segments(LAYOUT, WHOLE, start, min(330, start + 40))) == whole[start : start + 40]
    # Whole spans: no more of them than the blocks that are touched.
    assert len(list(segments(LAYOUT, WHOLE, 0, 330))) == 12
    assert list(segments(LAYOUT, WHOLE, 5, 5)) == []


def test_samples_are_windows_in_the_order_of_each_group():
    wanted = windows_by_hand(by_hand(3), 10, ordinal=2, groups=6)
    windows = Windows(LAYOUT, WHOLE, seq_length=10, ordinal=2)
    assert [positions(windows[index]) for index in range(30)] == wanted
    for index in (29, 0, 11, 5, 10, 4):
        spans = windows[index]
        assert positions(spans) == wanted[index]
        assert all(end != begin for (_, end), (begin, _) in itertools.pairwise(spans)), "neighbours are joined"


def test_a_window_longer_than_a_group_is_one_window():
    assert (LAYOUT.windows(50), LAYOUT.windows(51), LAYOUT.windows(26), LAYOUT.windows(25)) == (1, 1, 1, 2)
    assert positions(Windows(LAYOUT, WHOLE, seq_length=60, ordinal=0)[2]) == by_hand(2)[120:180]


def test_after_a_change_of_length_the_untaken_windows_come_first():
    whole = by_hand(4)
    taken = windows_by_hand(whole, 10, ordinal=0, groups=2)
    pieces = after(LAYOUT, WHOLE, seq_length=10, ordinal=0, taken=7)
    own = (StreamRange(50, 100),)
    assert pieces == (UntakenWindows(own, 10, 5, (0, 1), 2, 0, 30), StreamRange(100))
    stream = [*itertools.chain(*taken[7:]), *whole[100:]]
    assert positions(segments(LAYOUT, pieces, 0, 200)) == stream[:200]
    # Once more, in the middle of what the first change left: 2 windows of 8 are gone, 4 of the group's 6 are left.
    again = after(LAYOUT, pieces, seq_length=8, ordinal=1, taken=2)
    left = itertools.chain(*windows_by_hand(stream, 8, ordinal=1, groups=1)[2:])
    assert positions(segments(LAYOUT, again, 0, 150)) == [*left, *stream[48:]][:150]
    inner = (UntakenWindows(own, 10, 5, (0, 1), 2, 0, 30), StreamRange(100, 118))
    assert again == (UntakenWindows(inner, 8, 6, (1, 0), 2, 0, 32), StreamRange(118))
    assert from_json(to_json(again)) == again


def test_between_groups_nothing_is_left_over():
    assert after(LAYOUT, WHOLE, seq_length=10, ordinal=0, taken=0) == WHOLE
    assert after(LAYOUT, WHOLE, seq_length=10, ordinal=0, taken=10) == (StreamRange(100),)
    assert after(LAYOUT, WHOLE, seq_length=8, ordinal=0, taken=6) == (StreamRange(48),)


def test_a_part_of_a_stream_is_a_stream():
    left = UntakenWindows((StreamRange(0, 50),), 10, 5, (0, 0), 1, 4, 40)
    pieces = (StreamRange(5, 15), left, StreamRange(50))
    stream = positions(segments(LAYOUT, pieces, 0, 200))
    for start, stop in [(0, 10), (0, 11), (3, 10), (9, 10), (10, 46), (12, 20), (9, 47), (45, 46), (46, 60), (0, 200)]:
        some = part(pieces, start, stop)
        assert positions(segments(LAYOUT, some, 0, stop - start)) == stream[start:stop]
        assert [piece.stop is not None for piece in some] == [True] * len(some)
    assert part(pieces, 12, 20) == (UntakenWindows((StreamRange(0, 50),), 10, 5, (0, 0), 1, 6, 14),)
    assert part(pieces, 8, 12) == (StreamRange(13, 15), UntakenWindows((StreamRange(0, 50),), 10, 5, (0, 0), 1, 4, 6))
    assert part(pieces, 10, None) == (left, StreamRange(50))
    assert part(pieces, 0, None) == pieces
    assert part(pieces, 60, None) == (StreamRange(64),)


def test_a_stream_as_json():
    pieces = (UntakenWindows((StreamRange(0, 50),), 10, 5, (7, 8), 1, 4, 40), StreamRange(50))
    assert to_json(pieces) == [
        {
            "of": [{"start": 0, "stop": 50}],
            "seq_length": 10,
            "windows": 5,
            "key": [7, 8],
            "taken": 1,
            "start": 4,
            "stop": 40,
        },
        {"start": 50, "stop": None},
    ]
    assert from_json(to_json(pieces)) == pieces


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
    assert large == StreamLayout(10**12, 1 << 20, 64 << 20, (1, zlib.crc32(b"a")))
    middle = StreamLayout.of(10**8 + 1, seed=0, name="a").block
    assert (middle, type(middle)) == (10**8 // 256, int)
    assert StreamLayout.of(2**40, seed=0, name="a").group == 64 << 20
    assert StreamLayout.of(1000, seed=0, name="a").block == 1 << 16


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
