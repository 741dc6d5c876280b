"""What becomes of local checkpoints when a run ends by an error of its numbers."""

from types import SimpleNamespace

import pytest

from megatron_qwen.errors import NumericsError, Problem, SilentCorruptionError
from megatron_qwen.training.callbacks.local_checkpoints import LocalCheckpoints

PROBLEM = Problem("iteration 3", None, "is wrong.")


@pytest.mark.parametrize(
    ("error", "discarded"), [(NumericsError(PROBLEM), 1), (SilentCorruptionError(PROBLEM, suspects=[0]), 0)]
)
def test_a_diverged_run_discards_them_and_a_faulty_rank_does_not(error, discarded):
    calls = []
    callback = LocalCheckpoints.__new__(LocalCheckpoints)
    callback._writer = SimpleNamespace(discard=lambda: calls.append(1))
    callback.on_numerics_error(error)
    assert len(calls) == discarded
