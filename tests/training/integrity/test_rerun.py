"""Which steps are computed again, and what becomes of a spike that the data explains."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_qwen.errors import SilentCorruptionError
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.training.callbacks import build
from megatron_qwen.training.integrity import rerun
from megatron_qwen.training.step import StepResult
from tests.training.attempts import configure


def look(config: Any, losses: list[float], recalled: list[dict[str, Any]]) -> list[tuple[bool, int, Any]]:
    """Hands steps of these losses to a guard on one rank, whose repetitions give the same.

    Returns:
        For each whether it is skipped, how often it was computed again, and the cause that was found.
    """
    from dataclasses import replace
    from functools import partial

    from megatron_qwen.rundir import RunDirectory
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.base import Callback
    from megatron_qwen.training.callbacks.build import build_guard
    from megatron_qwen.training.integrity.rerun import StepInputs
    from megatron_qwen.training.step import compute_gradients
    from megatron_qwen.training.trainer import Trainer

    class Counting(Callback):
        told = 0

        def before_rerun(self) -> None:
            self.told += 1

    components, callback = build_components(config), Counting()
    trainer, guard = Trainer(components, []), build_guard(components, RunDirectory(Path("/no/such/run")), [callback])
    assert guard is not None
    guard.recall(recalled)
    reader = components.data.at(0)
    request = trainer._request(0, reader)
    batches = components.loader.load(reader, request, lambda: iter(()))
    real = partial(
        compute_gradients, config, components.model, components.optimizer, components.groups, components.forward_step
    )
    found = []
    for loss in losses:
        calls: list[float] = []

        def again(batches: Any, calls: list[float] = calls, loss: float = loss) -> Any:
            calls.append(loss)
            return replace(real(batches), loss=loss, grad_norm=1.0)

        guard.before_step(StepInputs(batches, reader, request))
        first = again(batches)
        before = callback.told
        result = guard.examine(first, again)
        assert callback.told - before == len(calls) - 1, "callbacks hear of every pass"
        assert result.loss == loss
        components.progress.iteration += 1
        found.append((result.skipped, len(calls) - 1, guard.finding.get("spike_cause")))
    return found


@pytest.fixture
def config(tokens):
    return configure("tiny_dense", tokens, "training.global_batch_size=1", "data.seq_length=32")


def test_a_spike_of_the_data_is_kept_and_the_next_ones_are_left_alone_unless_far_larger(config, pool):
    # Least spread 1 % of the median, 0.02: 3.0 scores 50, 4.0 scores 100, 50.0 more than ten times 50.
    losses = [2.0] * 20 + [3.0, 4.0, 50.0, 2.0]
    ((*calm, spike, quiet, far, after),) = pool[1].run(look, config, losses, [])
    assert set(calm) == {(False, 0, None)}
    assert spike == far == (False, 1, "data")
    assert quiet == after == (False, 0, None)


def test_a_spike_of_the_data_can_be_skipped_and_does_not_enter_the_median(config, pool):
    config = config.with_section("resilience", spike_action="skip", spike_window=16)
    ((*_, spike, after),) = pool[1].run(look, config, [2.0] * 20 + [3.0, 2.0], [])
    assert spike == (True, 1, "data")
    assert after == (False, 0, None)


def test_a_resumed_run_decides_as_one_that_was_not_stopped(config, pool):
    steps = [{"iteration": n, "lm_loss": 2.0, "grad_norm": 1.0, "skipped": False} for n in range(-20, 0)]
    assert pool[1].run(look, config, [3.0], steps) == [[(False, 1, "data")]]
    assert pool[1].run(look, config, [3.0], []) == [[(False, 0, None)]]
    steps[-1] |= {"lm_loss": 3.0, "spike_cause": "data", "spike_score": 50.0}
    assert pool[1].run(look, config, [3.0], steps) == [[(False, 0, None)]]


def faulty(config: Any, results: Iterator[float]) -> tuple[int, ...]:
    """Suspects of a guard for which each pass has the next of these losses; rank 1's bits change every time."""
    components = SimpleNamespace(config=config, progress=SimpleNamespace(iteration=4), batch_slice=SimpleNamespace())
    components.batch_slice.device = None
    guard = rerun.StepGuard(components)
    guard._repeat = lambda compute, batches: (StepResult(next(results), 1.0, 8, 8, False), None)
    guard._inputs = SimpleNamespace(batches=[])
    first = StepResult(math.inf, 1.0, 8, 8, True)
    with pytest.raises(SilentCorruptionError) as raised:
        guard.examine(first, lambda batches: first)
    return raised.value.suspects


@pytest.mark.parametrize(("gpu", "suspects"), [(True, ()), (False, (1,))])
def test_on_a_gpu_bits_name_nobody(gpu, suspects, monkeypatch):
    """They differ on every rank there."""
    monkeypatch.setattr(rerun.device, "has_cuda", lambda: gpu)
    monkeypatch.setattr(rerun, "residue", lambda components: (0, 0))
    monkeypatch.setattr(rerun, "odd_ranks", lambda one, other, device: (1,))
    assert faulty(RECIPES["tiny_dense"](), iter([2.0, 3.0])) == suspects


def test_results_are_alike_up_to_rounding():
    inf, nan = math.inf, math.nan
    for tolerance in (0.0, 0.01):
        assert rerun._close(nan, nan, tolerance=tolerance)
        assert rerun._close(inf, inf, tolerance=tolerance)
        assert not rerun._close(inf, 1e30, tolerance=tolerance)
        assert not rerun._close(1.0, nan, tolerance=tolerance)
        assert not rerun._close(1.0, 1.02, tolerance=tolerance)
        assert rerun._close(1.0, 1.009, tolerance=tolerance) is (tolerance > 0)
        # An overflow may be either, where sums are not formed in the same order.
        assert rerun._close(inf, nan, tolerance=tolerance) is (tolerance > 0)


def test_a_pass_that_changes_the_next_ones_scales_is_not_repeated(monkeypatch, caplog):
    monkeypatch.setattr(build, "dist", SimpleNamespace(get_rank=lambda: 0))
    components = SimpleNamespace(config=RECIPES["tiny_dense"]().with_section("precision", fp8="delayed"))
    with caplog.at_level(logging.INFO):
        assert build.build_guard(components, None, []) is None
    assert "with precision.fp8=delayed each pass changes" in caplog.text
