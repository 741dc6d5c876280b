"""torch.cuda answers for the CPU."""

from typing import Any

import torch

from tests.core_patches.observe import outcome


def observe(prepared: bool) -> dict[str, Any]:
    """What megatron-core calls at its start, around its collectives and for its random state."""
    if prepared:  # where there is no CUDA, streams cannot be made at all
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
            torch.cuda.Event().record()
    return {
        "current": outcome(lambda: str(torch.cuda.current_device())),
        "synchronize": outcome(lambda: torch.cuda.synchronize() or "done"),
        "memory": outcome(torch.cuda.memory_allocated),
        "random": outcome(_restores_random_state),
        "tracker": outcome(_forks_random_state),
    }


def _restores_random_state() -> bool:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.random.set_rng_state(state)
    return torch.equal(first, torch.rand(3))


def _forks_random_state() -> bool:
    """megatron-core's tracker draws alike from the same seed, and leaves the generator around it alone."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    drawn = []
    for _ in range(2):
        tracker = CudaRNGStatesTracker()
        tracker.add("dropout", 7)
        before = torch.get_rng_state()
        with tracker.fork("dropout"):
            drawn.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), before)
    return torch.equal(*drawn)


def test_answers_for_the_cpu(observed):
    assert observed.prepared == {"current": "cpu", "synchronize": "done", "memory": 0, "random": True, "tracker": True}


def test_plain_torch_asks_for_a_driver(observed):
    for name in ("current", "synchronize", "random", "tracker"):
        assert observed.plain[name].endswith("Error"), name
