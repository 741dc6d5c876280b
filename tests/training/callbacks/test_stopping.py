"""Ranks stop together, whichever of them was signalled."""

import signal
from types import SimpleNamespace

import pytest


def codes_of(signalled: int, number: signal.Signals | None) -> list[int]:
    """With which exit codes this rank's trainer is stopped after a step, where one rank has received a signal."""
    import torch
    import torch.distributed as dist

    from megatron_qwen.resilience.signals import StopSignals
    from megatron_qwen.training.callbacks.stopping import Stopping

    signals, codes = StopSignals(), []
    if dist.get_rank() == signalled:
        signals.received = number
    place = SimpleNamespace(batch_slice=SimpleNamespace(device=torch.device("cpu")))
    trainer = SimpleNamespace(components=place, stop=codes.append)
    Stopping(signals).after_step(trainer, SimpleNamespace(iteration=7))
    return codes


@pytest.mark.parametrize("signalled", [0, 1])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)])
def test_all_ranks_stop_with_the_one_that_was_signalled(signalled, number, code, pool):
    assert pool[2].run(codes_of, signalled, number) == [[code], [code]]


def test_without_a_signal_no_rank_stops(pool):
    assert pool[2].run(codes_of, 0, None) == [[], []]
