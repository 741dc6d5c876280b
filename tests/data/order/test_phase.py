"""A phase gives every source its share, names each sample's place in its source, and goes on after a resume."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_qwen.data.order.packing import Documents
from megatron_qwen.data.order.phase import Phase, SourceOrder, SourcePosition
from megatron_qwen.data.order.stream import StreamLayout

LENGTHS = [3, 5, 8, 2, 7, 6, 4, 1] * 8
BOUNDS = np.concatenate(([0], np.cumsum(LENGTHS)))
ORDERS = {
    "windows": SourceOrder(StreamLayout.of(4096, seed=1, name="windows"), None),
    "packed": SourceOrder(
        None, Documents.of(len(LENGTHS), lambda first, stop: BOUNDS[first : stop + 1], seed=1, name="packed")
    ),
}
WEIGHTS = {"windows": 0.75, "packed": 0.25}
START = {name: SourcePosition().cut(ORDERS[name], 16) for name in WEIGHTS}


def phase(**changes) -> Phase:
    return Phase(ORDERS, WEIGHTS, **{"seq_length": 16, "first_sample": 100, "begins": START, **changes})


def test_shares_and_numbers():
    whole = phase()
    samples = [whole[number] for number in range(100, 140)]
    assert Counter(name for name, _, _ in samples) == {"windows": 30, "packed": 10}
    for name in WEIGHTS:
        assert [number for chosen, number, _ in samples if chosen == name] == list(
            range(30 if name == "windows" else 10)
        )
    assert whole.counts(0) == {"windows": 0, "packed": 0}
    assert whole.counts(40) == {"windows": 30, "packed": 10}
    assert whole.counts(20) == {"windows": 15, "packed": 5}, "asked for again after later ones"


def test_a_window_is_sixteen_tokens_and_a_row_is_whole_documents():
    whole, starts = phase(), set(BOUNDS.tolist())
    for number in range(100, 120):
        name, _, spans = whole[number]
        length = sum(b - a for a, b in spans)
        if name == "windows":
            assert length == 16
        else:
            assert 0 < length <= 16
            assert all(a in starts and b in starts for a, b in spans)


@pytest.mark.parametrize("taken", [0, 1, 7, 24])
def test_goes_on_where_it_was_resumed(taken):
    whole = phase()
    resumed = phase(counts=whole.counts(taken), resumed=whole.positions(taken))
    for number in range(100 + taken, 150):
        assert resumed[number] == whole[number]
    assert resumed.counts(50) == whole.counts(50)
    assert resumed.positions(50) == whole.positions(50)
    if taken:
        with pytest.raises(AssertionError, match="before the one"):
            resumed[99 + taken]


def test_what_is_forgotten_is_still_counted():
    whole, other = phase(), phase()
    for samples in (10, 10, 5, 25):
        other.forget(samples)
    assert [other[number] for number in range(125, 150)] == [whole[number] for number in range(125, 150)]
    assert other.counts(40) == whole.counts(40)
    with pytest.raises(AssertionError, match="before the one"):
        other[124]


def test_a_position_comes_back_from_a_checkpoint():
    for name, position in phase().positions(37).items():
        assert SourcePosition.restored(position.as_dict()) == position
        other = position.cut(ORDERS[name], 8)
        assert SourcePosition.restored(other.as_dict()) == other


def test_the_first_length_is_no_change_of_length_and_another_is():
    position = SourcePosition()
    assert (position.seq_length, position.ordinal, position.taken) == (None, 0, 0)
    first = position.cut(ORDERS["windows"], 16)
    assert first == replace(position, seq_length=16)
    later = first.on(3).on(2)
    assert later == replace(first, taken=5)
    assert later.cut(ORDERS["windows"], 16) == later
    shorter = later.cut(ORDERS["windows"], 8)
    assert (shorter.seq_length, shorter.ordinal, shorter.taken) == (8, 1, 0)


def read_on(name: str, samples: int) -> list[int]:
    """Tokens of five samples of 16, then of some of 8."""
    first = START[name].reader(ORDERS[name])
    second = START[name].on(5).cut(ORDERS[name], 8).reader(ORDERS[name])
    spans = [span for number in range(5) for span in first[number]]
    spans += [span for number in range(samples) for span in second[number]]
    return [token for begin, end in spans for token in range(begin, end)]


def test_after_a_change_of_length_the_rest_of_the_source_comes_first():
    # One group of windows: 80 tokens are taken, then the other 4,016 together with the first 80 of the next epoch.
    seen = Counter(read_on("windows", 512))
    assert len(seen) == 4096
    assert seen.total() == 4096 + 80
    rows = read_on("packed", 15)
    assert len(rows) == len(set(rows)) > 15, "no document twice within an epoch"
