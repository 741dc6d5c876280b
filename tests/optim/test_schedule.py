"""Learning rate and batch size as functions of progress."""

import itertools
import math

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
