"""Tensors and modules that are sent to a GPU stay on the CPU."""

from typing import Any

import torch

from tests.core_patches.observe import outcome


def observe(prepared: bool) -> dict[str, Any]:
    """What becomes of them."""
    moved = torch.zeros(2)
    return {
        "to": outcome(lambda: moved.to("cuda:0").device.type),
        "to by keyword": outcome(lambda: str(moved.to(device=torch.device("cuda"), dtype=torch.float64).dtype)),
        "cuda": outcome(lambda: moved.cuda() is moved),
        "module": outcome(lambda: torch.nn.Linear(2, 2).cuda().weight.device.type),
        "record_stream": outcome(lambda: moved.record_stream(None)),
        "type": moved.type(),
        "cast by type": str(moved.type(torch.float64).dtype),
    }


def test_stay_on_the_cpu(observed):
    assert observed.prepared == {
        "to": "cpu",
        "to by keyword": "torch.float64",
        "cuda": True,
        "module": "cpu",
        "record_stream": None,
        "type": "torch.cuda.FloatTensor",
        "cast by type": "torch.float64",
    }


def test_plain_torch_asks_for_a_driver(observed):
    for name in ("to", "to by keyword", "cuda", "module", "record_stream"):
        assert str(observed.plain[name]).endswith("Error"), name
    assert observed.plain["type"] == "torch.FloatTensor"
