"""The formulas, as written and compiled, are the operations that a run without a compiler takes step by step."""

import logging

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from megatron_qwen.models.torch_backend import compiled, formulas
from megatron_qwen.models.torch_backend.compiled import Kernels
from megatron_qwen.models.torch_backend.functions import RMSNormFunction, RotateQKV, SwiGLU
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS
from megatron_qwen.objectives.cross_entropy import _block_loss, _Target
from tests.tiers import cases

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


def small_operations(dtype: torch.dtype) -> list[torch.Tensor]:
    """Values and gradients of each, by whichever way the process takes."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    found = []
    x, weight, mixed = drawn(6, 2, 64), drawn(64), drawn(6, 2, 2, 5, 16)
    angles = torch.randn(6, 8)
    for function, inputs, constant in (
        (SwiGLU, (x,), ()),
        (RMSNormFunction, (x, weight), (1e-6,)),
        (RotateQKV, (mixed,), (angles.cos().to(dtype), angles.sin().to(dtype))),
    ):
        out = function.apply(*inputs, *constant)
        outs = out if isinstance(out, tuple) else (out,)
        found += [*outs, *torch.autograd.grad(outs, inputs, [torch.randn_like(one) for one in outs])]
    logits = torch.randn(7, 50, dtype=dtype)
    mine = torch.arange(7) != 3
    target = _Target(torch.arange(7) * 5, mine, torch.rand(7), 45, Alone())
    return [*found, _block_loss(logits, target, with_gradient=True), logits]


@pytest.fixture
def as_written(monkeypatch):
    """The formulas take part, without a compiler."""
    monkeypatch.setattr(compiled.torch, "compile", lambda formula: formula)
    with PROCESS_KERNELS.using(Kernels()):
        yield


@pytest.fixture
def by_kernels():
    with PROCESS_KERNELS.using(Kernels()):
        yield


def compare(dtype: torch.dtype) -> None:
    assert PROCESS_KERNELS.of(formulas.swiglu) is not None
    ours = small_operations(dtype)
    assert PROCESS_KERNELS.of(formulas.swiglu) is not None, "the compiler failed"
    with PROCESS_KERNELS.using(None):
        step_by_step = small_operations(dtype)
    for mine, plain in zip(ours, step_by_step, strict=True):
        assert mine.dtype == plain.dtype
        assert mine.shape == plain.shape
        torch.testing.assert_close(mine, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_as_written(as_written, dtype):
    compare(dtype)


@pytest.mark.parametrize("dtype", cases([torch.bfloat16], [torch.float32]), ids=str)
def test_compiled(by_kernels, dtype):
    compare(dtype)


def test_tokens_of_experts_change_from_step_to_step(by_kernels):
    for length in (3, 5, 0, 1, 9):
        rows = torch.randn(length, 64, requires_grad=length > 3)
        torch.testing.assert_close(SwiGLU.apply(rows), formulas.swiglu(rows))
    assert PROCESS_KERNELS.of(formulas.swiglu) is not None, "the compiler failed"


def broken(formula):
    def fail(*_):
        raise TorchDynamoException("g++: no such file\nmore of it")

    return fail


def test_a_kernel_that_cannot_be_made(monkeypatch, caplog):
    monkeypatch.setattr(compiled.torch, "compile", broken)
    kernels = Kernels()
    rows = torch.randn(3, 8)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(kernels.of(formulas.swiglu)(rows), formulas.swiglu(rows))
    failed = "torch.compile failed; this rank continues with uncompiled operations, which round differently"
    assert caplog.messages == [f"{failed}: g++: no such file"]
    assert kernels.of(formulas.swiglu) is None


def test_an_error_of_an_operation_is_not_the_compilers(as_written):
    with pytest.raises(RuntimeError):
        PROCESS_KERNELS.of(formulas.swiglu_gradient)(torch.randn(3, 8), torch.randn(2, 4))
    assert PROCESS_KERNELS.of(formulas.swiglu) is not None


def test_a_compiler_is_tried(monkeypatch):
    assert compiled.compiler_failure() is None
    monkeypatch.setattr(compiled.torch, "compile", broken)
    assert compiled.compiler_failure() == "g++: no such file"


def test_a_compiler_is_looked_for(monkeypatch):
    for command, found in (("g++ -m64", True), ("no-such-compiler", False), ("", True)):
        monkeypatch.setenv("CXX", command)
        assert compiled.compiler_is_here() is found


def test_no_tokens(as_written):
    for shape in ((0, 8), (0, 1, 8)):
        x = torch.empty(shape, requires_grad=True)
        (gradient,) = torch.autograd.grad(SwiGLU.apply(x), x, torch.empty(*shape[:-1], 4))
        assert gradient.shape == shape
