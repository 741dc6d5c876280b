"""Collections keep to their steps."""

import gc
from types import SimpleNamespace

import pytest

from megatron_qwen.training.callbacks.garbage import GarbageCollection


@pytest.fixture
def python_collects():
    yield
    gc.enable()


def test_collections_keep_to_their_steps(python_collects):
    """Garbage lies until the step that the interval names."""

    class Cycle:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Cycle.alive += 1

        def __del__(self) -> None:
            Cycle.alive -= 1

    callback = GarbageCollection(3)
    callback.before_training(SimpleNamespace())
    seen = []
    for iteration in range(1, 7):
        Cycle()
        for _ in range(2000):
            [].append([])
        callback.after_step(SimpleNamespace(), SimpleNamespace(iteration=iteration))
        seen.append(Cycle.alive)
    callback.close()
    assert seen == [1, 2, 0, 1, 2, 0]
    assert gc.isenabled()
