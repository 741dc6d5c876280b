"""The computed shuffle is a permutation, depends on its key, and mixes."""

import pytest

from megatron_qwen.data.order.permutation import KeyedPermutation, _mix

AWKWARD = [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 1021, 4095, 4096, 4097, 9973, 65_537]


# What runs have read by: another order would give a resumed run some samples twice and others never.
ORDERS = {
    (5, 7): [1, 2, 0, 4, 3],
    (13, 0): [5, 8, 4, 10, 3, 0, 12, 2, 7, 9, 11, 1],
    (64, 1, 2): [41, 46, 51, 1, 26, 40, 39, 63, 35, 23, 45, 12],
    (1000, 3, 0, -1, 5): [974, 570, 818, 169, 609, 682, 766, 291, 787, 520, 901, 147],
    (10**6, 2024, 3904355907, 0, 0): [249074, 511277, 275939, 209822, 263618, 736904, 770342, 670785, 707276, 848403],
    (10**15, 1, 2): [505679401616078, 57984285562981, 330962566920947, 810629426938887, 977532525311089],
}


@pytest.mark.parametrize("of", ORDERS)
def test_the_order_stays_what_it_is(of):
    order, wanted = KeyedPermutation(*of), ORDERS[of]
    assert [order[index] for index in range(len(wanted))] == wanted
    assert [order.index(item) for item in wanted] == list(range(len(wanted)))


def test_the_mixer_is_that_of_splitmix64():
    """The first outputs for the seed 1234567, as other implementations publish them."""
    step, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    assert [_mix((1234567 + count * step) & mask) for count in range(1, 6)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("size", AWKWARD)
def test_every_item_once_and_found_again(size):
    order = KeyedPermutation(size, 7, size)
    items = [order[index] for index in range(size)]
    assert sorted(items) == list(range(size))
    assert [order.index(item) for item in items] == list(range(size))


def test_every_item_is_as_likely_at_every_position():
    """Chi-square over 4,000 keys: 13 x 13 cells, 144 degrees of freedom, 0.1 % bound 201."""
    size, keys = 13, 4_000
    cells = [[0] * size for _ in range(size)]
    for key in range(keys):
        order = KeyedPermutation(size, key)
        for index in range(size):
            cells[index][order[index]] += 1
    expected = keys / size
    assert sum((count - expected) ** 2 / expected for row in cells for count in row) < 201


def test_depends_on_every_part_of_the_key():
    orders = {
        tuple(KeyedPermutation(500, *key)[index] for index in range(500)) for key in ((1, 0), (1, 1), (2, 0), (0, 1))
    }
    assert len(orders) == 4
    assert [KeyedPermutation(500, 1, 0)[index] for index in range(9)] == [
        KeyedPermutation(500, 1, 0)[index] for index in range(9)
    ]


def test_mixes():
    size = 10_000
    order = KeyedPermutation(size, 3, 0)
    values = [order[index] for index in range(size)]
    mean = (size - 1) / 2
    variance = sum((value - mean) ** 2 for value in values) / size
    for lag in (1, 2, 100):
        together = sum((a - mean) * (b - mean) for a, b in zip(values, values[lag:], strict=False)) / (size - lag)
        assert abs(together / variance) < 0.05, lag
    # A thousand draws fall evenly on ten tenths: chi-square with 9 degrees of freedom, 0.1 % bound 27.9.
    tenths = [0] * 10
    for value in values[:1000]:
        tenths[value * 10 // size] += 1
    assert sum((count - 100) ** 2 / 100 for count in tenths) < 27.9


def test_huge():
    order = KeyedPermutation(10**15, 1, 2)
    items = [order[index] for index in range(1000)]
    assert len(set(items)) == 1000
    assert all(0 <= item < 10**15 for item in items)
