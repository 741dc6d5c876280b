"""Learning rate and batch size as functions of progress."""

import itertools
import math
from types import SimpleNamespace

import pytest

from megatron_qwen.config.batch_size import global_batch_size
from megatron_qwen.config.sections import OptimConfig, TrainingConfig
from megatron_qwen.optim.schedule import learning_rate


def rates(style: str, steps: int = 100, **options: object) -> list[float]:
    optim = OptimConfig(
        learning_rate=1.0,
        min_learning_rate=0.1,
        lr_decay_style=style,
        lr_warmup_iters=10,
        **options,  # type: ignore[arg-type]
    )
    return [learning_rate(step, optim=optim, train_iters=steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("style", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_and_ends(style):
    values = rates(style)
    assert values[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert values[-1] == pytest.approx(1.0 if style == "constant" else 0.1)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values[9:]))


def test_shapes():
    assert rates("cosine")[54] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert rates("linear")[54] == pytest.approx(0.1 + 0.9 * 0.5)
    wsd = rates("wsd", lr_wsd_decay_iters=20)
    assert wsd[9:80] == [1.0] * 71
    assert wsd[84] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))
    late = rates("cosine", lr_decay_iters=50)
    assert late[49:] == pytest.approx([0.1] * 51)


def test_batch_ramp():
    training = TrainingConfig(global_batch_size=32, rampup_batch_size=(8, 8, 300))
    taken, sizes = 0, []
    while taken < 500:
        sizes.append(global_batch_size(taken, training))
        taken += sizes[-1]
    assert sizes == sorted(sizes)
    assert set(sizes) == {8, 16, 24, 32}
    assert global_batch_size(300, training) == 32
    assert global_batch_size(0, TrainingConfig(global_batch_size=32)) == 32


# Peak 1, floor 0.1, ten steps of warm-up, a hundred in all: rates at steps that are easy to work out by hand.
BY_HAND = {
    "cosine": ({"lr_decay_style": "cosine"}, {1: 0.1, 10: 1.0, 40: 0.775, 55: 0.55, 70: 0.325, 100: 0.1, 150: 0.1}),
    "linear": ({"lr_decay_style": "linear"}, {9: 0.9, 10: 1.0, 11: 0.99, 55: 0.55, 99: 0.11, 100: 0.1, 101: 0.1}),
    "constant": ({"lr_decay_style": "constant"}, {5: 0.5, 10: 1.0, 11: 1.0, 100: 1.0, 150: 1.0}),
    "wsd, linear": (
        {"lr_decay_style": "wsd", "lr_wsd_decay_iters": 20, "lr_wsd_decay_style": "linear"},
        {10: 1.0, 80: 1.0, 81: 0.955, 90: 0.55, 99: 0.145, 100: 0.1, 120: 0.1},
    ),
    "wsd, minus_sqrt": (
        {"lr_decay_style": "wsd", "lr_wsd_decay_iters": 25},
        {75: 1.0, 76: 0.82, 79: 0.64, 84: 0.46, 91: 0.28, 100: 0.1},
    ),
    "wsd, cosine": (
        {"lr_decay_style": "wsd", "lr_wsd_decay_iters": 30, "lr_wsd_decay_style": "cosine"},
        {70: 1.0, 80: 0.775, 85: 0.55, 90: 0.325, 100: 0.1},
    ),
    "wsd, a tenth of the run": (
        {"lr_decay_style": "wsd", "lr_wsd_decay_style": "linear"},
        {90: 1.0, 91: 0.91, 95: 0.55, 100: 0.1},
    ),
    "a decay that ends early": (
        {"lr_decay_style": "linear", "lr_decay_iters": 55},
        {10: 1.0, 37: 0.46, 55: 0.1, 56: 0.1},
    ),
    "no warm-up": ({"lr_decay_style": "linear", "lr_warmup_iters": 0}, {1: 0.991, 50: 0.55, 100: 0.1}),
    "all warm-up": ({"lr_decay_style": "cosine", "lr_warmup_iters": 100}, {1: 0.01, 50: 0.5, 100: 1.0}),
}


def ten_of_a_hundred(**options: object) -> OptimConfig:
    return OptimConfig(**{"learning_rate": 1.0, "min_learning_rate": 0.1, "lr_warmup_iters": 10, **options})


@pytest.mark.parametrize("name", BY_HAND)
def test_rates_by_hand(name):
    options, expected = BY_HAND[name]
    optim = ten_of_a_hundred(**options)
    found = {step: learning_rate(step, optim=optim, train_iters=100) for step in expected}
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_same_as_megatrons_scheduler(name):
    """megatron-core's rate after ``step`` increments; Megatron-LM gives it to the step after, whose first rate is 0."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    options, _ = BY_HAND[name]
    optim = ten_of_a_hundred(**options)
    end = optim.lr_decay_iters or 100
    # Megatron wants a decay after the warm-up, and has no schedule that is all warm-up.
    beyond = 1 if optim.lr_warmup_iters >= end else 0
    theirs = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[]),
        init_lr=0.0,
        max_lr=1.0,
        min_lr=0.1,
        lr_warmup_steps=optim.lr_warmup_iters,
        lr_decay_steps=end + beyond,
        lr_decay_style="WSD" if optim.lr_decay_style == "wsd" else optim.lr_decay_style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=optim.lr_wsd_decay_iters or end // 10,
        lr_wsd_decay_style=optim.lr_wsd_decay_style,
    )
    for step in range(1, 101):
        theirs.num_steps = step
        assert learning_rate(step, optim=optim, train_iters=100) == pytest.approx(theirs.get_lr({}), rel=1e-12), step
