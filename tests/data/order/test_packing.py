"""Documents are packed whole, tightly, every one once an epoch, and through changes of length."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qwen.data.order.packing import BEGINNING, Documents, PackedRows, best_fit, from_json, to_json


def documents(lengths: list[int]) -> Documents:
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    return Documents.of(len(lengths), lambda first, stop: bounds[first : stop + 1], seed=1, name="a")


@given(st.lists(st.integers(1, 50), max_size=200))
def test_best_fit_holds_everything_and_overfills_nothing(lengths):
    rows = best_fit(lengths, 50)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 50 for row in rows)
    # Two rows that would fit together are never both left open.
    fill = sorted(sum(lengths[item] for item in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > 50


def test_best_fit_is_tight_on_lengths_as_they_are():
    lengths = np.random.default_rng(0).lognormal(6.5, 1.2, 16_384).astype(int).clip(1, 4096).tolist()
    rows = best_fit(lengths, 4096)
    assert sum(lengths) / (len(rows) * 4096) > 0.99


def test_documents_stay_whole_and_come_once_an_epoch():
    lengths = np.random.default_rng(1).integers(1, 90, 3_000).tolist()
    source = documents(lengths)
    rows = PackedRows(source, BEGINNING, seq_length=100, ordinal=0)
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    seen: Counter = Counter()
    index = 0
    while sum(seen.values()) < 3_000:
        for begin, end in rows[index]:
            assert begin in starts
            assert end in ends
            seen[begin] += 1
        index += 1
    assert set(seen.values()) == {1}
    assert sorted(seen) == starts


def test_a_long_document_is_cut_into_rows():
    rows = PackedRows(documents([250]), BEGINNING, seq_length=100, ordinal=0)
    runs = sorted(run for index in range(3) for run in rows[index])
    assert runs == [(0, 100), (100, 200), (200, 250)]


def test_a_row_is_a_pure_function_of_its_number():
    lengths = np.random.default_rng(1).integers(1, 90, 40_000).tolist()
    forward = PackedRows(documents(lengths), BEGINNING, seq_length=100, ordinal=0)
    ahead = PackedRows(documents(lengths), BEGINNING, seq_length=100, ordinal=0)
    wanted = [0, 9_000, 12_345, 5]
    there = [ahead[index] for index in wanted]
    assert [forward[index] for index in sorted(wanted)] == [there[wanted.index(index)] for index in sorted(wanted)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=600),
    st.lists(st.tuples(st.sampled_from([10, 32, 64, 100]), st.integers(0, 60)), min_size=1, max_size=6),
)
def test_changes_of_length_lose_and_repeat_nothing(lengths, changes):
    source, cursor = documents(lengths), BEGINNING
    seen: Counter = Counter()
    for ordinal, (seq_length, rows) in enumerate(changes):
        packed = PackedRows(source, cursor, seq_length=seq_length, ordinal=ordinal)
        for index in range(rows):
            for begin, end in packed[index]:
                seen.update(range(begin, end))
        cursor = from_json(to_json(packed.after(rows)))
    last = PackedRows(source, cursor, seq_length=7, ordinal=99)
    for pool in range(len(cursor.left)):
        for row in last._rows(pool):
            for begin, end in row:
                seen.update(range(begin, end))
    assert sum(seen.values()) == cursor.pool * sum(lengths)  # so few documents are one pool
    assert set(seen.values()) <= {cursor.pool}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_a_row_is_found_from_an_advanced_cursor(lengths, steps):
    """As a run finds it that resumes: the same rows, and the same again after a change of length."""
    source = documents(lengths)
    first = PackedRows(source, BEGINNING, seq_length=64, ordinal=0)
    start = PackedRows(source, from_json(to_json(first.after(7))), seq_length=32, ordinal=1)
    taken, other = 0, start
    for step in steps:
        assert [other[index] for index in range(taken, taken + step)] == [
            start[index] for index in range(taken, taken + step)
        ]
        taken += step
        other = PackedRows(source, from_json(to_json(other.advanced(taken))), seq_length=32, ordinal=1)
    assert other.after(taken) == start.after(taken)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000, 20_000])
def test_pools_of_an_epoch_hold_every_document_once(count):
    source = documents([1] * count)
    rows = PackedRows(source, BEGINNING, seq_length=1, ordinal=0)
    assert sorted(rows[index][0][0] for index in range(count)) == list(range(count))
    assert sorted(rows[count + index][0][0] for index in range(count)) == list(range(count))
