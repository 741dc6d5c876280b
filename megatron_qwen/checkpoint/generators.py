"""State of every random generator of a rank, as named tensors."""

import random

import numpy as np
import torch
from megatron.core import tensor_parallel

from megatron_qwen import device


def capture() -> dict[str, torch.Tensor]:
    """The state of Python's, numpy's, torch's and the device's generators and of dropout's tracker."""
    _, words, position, has_gauss, gauss = np.random.get_state()
    version, internal, pending = random.getstate()
    states = {
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([] if pending is None else [pending], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(words, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "device": device.rng_state().cpu(),
    }
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {**states, **{f"tracker.{name}": _plain(state).cpu() for name, state in tracker.items()}}


def restore(states: dict[str, torch.Tensor]) -> None:
    """Puts every generator where ``capture`` found it."""
    version, *internal = states["python"].tolist()
    pending = states["python_gauss"].tolist()
    random.setstate((version, tuple(internal), pending[0] if pending else None))
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    words = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), gauss))
    torch.set_rng_state(states["torch"])
    device.set_rng_state(states["device"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracked = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    for name, present in tracker.get_states().items():
        if isinstance(present, torch.Generator) and name in tracked:
            present.set_state(tracked[name])
            tracked[name] = present  # type: ignore[assignment]
    tracker.set_states(tracked)


def _plain(state: torch.Tensor | torch.Generator) -> torch.Tensor:
    """What a tracker has for a generator: under CUDA graphs the generator itself, which a graph has been told of."""
    return state.get_state() if isinstance(state, torch.Generator) else state
