"""Generators go on where they were, also those that CUDA graphs have been told of."""

import random

import numpy as np
import torch
from megatron.core import tensor_parallel

from megatron_qwen.checkpoint import generators


class Tracker:
    """What megatron-core's and Transformer Engine's trackers have in common."""

    def __init__(self, states: dict[str, object]) -> None:
        self.states = states

    def get_states(self) -> dict[str, object]:
        return dict(self.states)

    def set_states(self, states: dict[str, object]) -> None:
        self.states = states


def test_a_tracked_generator_keeps_its_identity(monkeypatch):
    """A graph draws from the generator that it was recorded with: a restore must not put another in its place."""
    generator = torch.Generator().manual_seed(5)
    tracker = Tracker({"dropout": generator})
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    saved = {name: state.clone() for name, state in generators.capture().items()}
    expected = (torch.rand(3, generator=generator), torch.rand(3), random.random(), np.random.rand())
    generators.restore(saved)
    assert tracker.states == {"dropout": generator}
    again = (torch.rand(3, generator=generator), torch.rand(3), random.random(), np.random.rand())
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])
    assert again[2:] == expected[2:]


def test_a_checkpoint_passes_between_runs_with_graphs_and_without(monkeypatch):
    generator, state = torch.Generator().manual_seed(5), torch.Generator().manual_seed(7).get_state()
    for first, second in (({"a": generator}, {"a": state}), ({"a": state}, {"a": generator})):
        tracker = Tracker(first)
        monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda tracker=tracker: tracker)
        saved = {name: tensor.clone() for name, tensor in generators.capture().items()}
        tracker.states = second
        generators.restore(saved)
        (now,) = tracker.states.values()
        assert torch.equal(now.get_state() if isinstance(now, torch.Generator) else now, saved["tracker.a"])
