"""The process computes with the kernels of the present run."""

import torch

from megatron_qwen.models.torch_backend import compiled, formulas
from megatron_qwen.models.torch_backend.compiled import Kernels
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS, ProcessKernels


def test_none_at_the_start():
    assert ProcessKernels().of(formulas.swiglu) is None
    assert PROCESS_KERNELS.present is None, "another test has left its kernels behind"


def test_those_of_the_run(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda formula: formula)
    holder, kernels = ProcessKernels(), Kernels()
    with holder.using(kernels):
        kernel = holder.of(formulas.swiglu)
        assert kernel is kernels.of(formulas.swiglu)
        rows = torch.randn(2, 6)
        assert torch.equal(kernel(rows), formulas.swiglu(rows))
    assert holder.of(formulas.swiglu) is None
    holder.use(kernels)
    assert holder.of(formulas.swiglu) is kernel, "made once a run"
