"""Functions of torch.cuda that megatron-core calls without asking for a GPU answer for the CPU.

Replaces: functions and classes of ``torch.cuda`` and ``torch.cuda.random``. Streams and events do nothing: on a CPU
    everything is in order already. The generator of "the device" is the CPU's.
Needed: with every megatron-core so far (0.19.2 too). Its schedules, its buffers and its random state tracker call
    torch.cuda throughout, and several modules bind names of it at import.
When: before megatron.core is imported, on processes without a GPU.
Upstream: NVIDIA/Megatron-LM pull request 6270 (open) removes such calls from model conversion, not from training.
Can go: when megatron-core trains on a CPU over gloo.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")


def apply() -> None:
    """Replaces them; what is replaced is the same after every call."""
    cuda: Any = torch.cuda
    for name, value in _REPLACEMENTS.items():
        setattr(cuda, name, value)
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state


class _Stream:
    """A stream or event of a device that has none."""

    device = _CPU

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> "_Stream":
        return self

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _OneGenerator:
    """``torch.cuda.default_generators`` where every index is the CPU's generator."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


@contextlib.contextmanager
def _nothing(*args: object, **kwargs: object) -> Iterator[None]:
    yield


_THE_STREAM = _Stream()

_REPLACEMENTS: dict[str, Any] = {
    "current_device": lambda: _CPU,
    "set_device": lambda device: None,
    "device_count": lambda: 1,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "Stream": _Stream,
    "Event": _Stream,
    "current_stream": lambda device=None: _THE_STREAM,
    "default_stream": lambda device=None: _THE_STREAM,
    "stream": _nothing,
    "device": _nothing,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "is_current_stream_capturing": lambda: False,
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "default_generators": _OneGenerator(),
    # torch defers such calls until CUDA is initialised, which would be never.
    "_lazy_call": lambda callable_, **kwargs: callable_(),
}
