"""Factories of tensors take device="cuda" for the CPU."""

import torch

from tests.core_patches.observe import outcome

MAKE = {
    "arange": lambda: torch.arange(3, device="cuda"),
    "as_tensor": lambda: torch.as_tensor([1], device=torch.device("cuda", 0)),
    "empty": lambda: torch.empty(3, device="cuda:0"),
    "empty_like": lambda: torch.empty_like(torch.ones(3), device="cuda"),
    "eye": lambda: torch.eye(3, device="cuda"),
    "full": lambda: torch.full((3,), 1.0, device="cuda"),
    "full_like": lambda: torch.full_like(torch.ones(3), 1.0, device="cuda"),
    "linspace": lambda: torch.linspace(0, 1, 3, device="cuda"),
    "ones": lambda: torch.ones(3, device="cuda"),
    "ones_like": lambda: torch.ones_like(torch.ones(3), device="cuda"),
    "pinned": lambda: torch.empty(3, pin_memory=True),
    "rand": lambda: torch.rand(3, device="cuda"),
    "randint": lambda: torch.randint(3, (3,), device="cuda"),
    "randn": lambda: torch.randn(3, device="cuda"),
    "tensor": lambda: torch.tensor([1], device="cuda"),
    "zeros": lambda: torch.zeros(3, device="cuda"),
    "zeros_like": lambda: torch.zeros_like(torch.ones(3), device="cuda"),
}


def observe(prepared: bool) -> dict[str, str]:
    """Where each puts its tensor, and where a factory under ``with torch.device`` does."""
    found = {name: outcome(lambda make=make: make().device.type) for name, make in MAKE.items()}
    with torch.device("meta"):
        found["with meta"] = torch.empty(2).device.type
    return found


def test_on_the_cpu(observed):
    assert observed.prepared == {**dict.fromkeys(MAKE, "cpu"), "with meta": "meta"}


def test_plain_torch_asks_for_a_driver(observed):
    assert all(observed.plain[name].endswith("Error") for name in MAKE)
