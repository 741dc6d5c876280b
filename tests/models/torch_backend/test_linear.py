"""Linear layers of the torch backend on a CPU: torch's own results, and weight gradients where they are summed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_qwen.config.source import resolve
from megatron_qwen.models.torch_backend import dense_gemm
from megatron_qwen.models.torch_backend import linear as torch_linear
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.tiers import cases


def drawn(dtype: torch.dtype, *, bias: bool) -> tuple[torch.Tensor, torch.nn.Parameter, torch.nn.Parameter | None]:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 32, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(48, 32, dtype=dtype))
    return x, weight, torch.nn.Parameter(torch.randn(48, dtype=dtype)) if bias else None


def gradients(function, x, weight, bias, upstream):
    out = function(x, weight, bias)
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_torch(monkeypatch, onednn, bias, dtype, tolerance):
    monkeypatch.setattr(dense_gemm, "_onednn_pays", lambda: onednn)
    inputs = drawn(dtype, bias=bias)
    upstream = torch.randn(5, 3, 48, dtype=dtype)
    ours = gradients(torch_linear._Linear.apply, *inputs, upstream)
    theirs = gradients(F.linear, *inputs, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("onednn", [True, False])
def test_an_expert_without_tokens(monkeypatch, onednn):
    monkeypatch.setattr(dense_gemm, "_onednn_pays", lambda: onednn)
    _, weight, _ = drawn(torch.float32, bias=False)
    x = torch.empty(0, 32, requires_grad=True)
    out = torch_linear._Linear.apply(x, weight, None)
    assert out.shape == (0, 48)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


def test_weight_gradients_are_added_into_the_sum():
    x, weight, _ = drawn(torch.float32, bias=False)
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(48, 32), False
    upstream = torch.randn(5, 3, 48)
    torch_linear._Linear.apply(x, weight, None).backward(upstream)
    assert weight.grad_added_to_main_grad
    expected = 1 + upstream.flatten(0, 1).t() @ x.detach().flatten(0, 1)
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-5, atol=1e-4)


def test_a_sum_of_another_format_is_left_to_the_core():
    x, weight, _ = drawn(torch.bfloat16, bias=False)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(48, 32), False
    upstream = torch.randn(5, 3, 48, dtype=torch.bfloat16)
    torch_linear._Linear.apply(x, weight, None).backward(upstream)
    assert not weight.grad_added_to_main_grad
    assert not weight.main_grad.any()
    torch.testing.assert_close(weight.grad, upstream.flatten(0, 1).t() @ x.detach().flatten(0, 1))


def test_what_follows_may_work_in_place():
    x, weight, bias = drawn(torch.float32, bias=True)
    out = torch_linear._Linear.apply(x, weight, bias)
    out += 1
    out.sum().backward()
    assert x.grad is not None


def test_a_weight_with_other_gradients_gets_zeros():
    x, weight, _ = drawn(torch.float32, bias=False)
    weight.main_grad, weight.zero_out_wgrad = torch.zeros(48, 32), True
    torch_linear._Linear.apply(x, weight, None).sum().backward()
    assert not weight.grad.any()
    assert weight.main_grad.any()


def with_layers_of_the_core(config, steps):
    """The same run with every GEMM left to megatron-core."""
    ours = torch_linear._on_a_cpu_alone
    torch_linear._on_a_cpu_alone = lambda *_: False
    try:
        return jobs.train(config, steps)
    finally:
        torch_linear._on_a_cpu_alone = ours


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlapped": {"parallel.overlap_grad_reduce": True},
    "recomputed": {"training.recompute_granularity": "full", "training.recompute_method": "uniform"},
    "expert by expert": {"performance.moe_grouped_gemm": False},
}


@pytest.mark.parametrize(
    ("recipe", "changed"),
    cases(
        [("tiny_dense", "overlapped"), ("tiny_moe", "recomputed"), ("tiny_moe", "expert by expert")],
        [("tiny_dense", "plain"), ("tiny_dense", "recomputed"), ("tiny_moe", "plain"), ("tiny_moe", "overlapped")],
    ),
)
def test_training_equals_that_with_the_cores_layers(recipe, changed, pool, tokens):
    """Several micro-batches a step on two data-parallel ranks: nothing is added twice or lost."""
    words = ["training.micro_batch_size=1", "training.global_batch_size=6", f"data.path={tokens}"]
    config = resolve(recipe, words, RECIPES)
    for path, value in CHANGES[changed].items():
        section, name = path.split(".")
        config = config.with_section(section, **{name: value})
    ours = pool[2].run(jobs.train, config, 3)[0]["losses"]
    theirs = pool[2].run(with_layers_of_the_core, config, 3)[0]["losses"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert pool[2].run(weights_added_in_place, config)[0] > 0


def weights_added_in_place(config):
    """How many weights had their gradients added by the GEMM after one backward pass."""
    added = []
    ours = torch_linear._weight_gradient

    def counted(weight, *args):
        gradient = ours(weight, *args)
        added.append(weight.grad_added_to_main_grad)
        return gradient

    torch_linear._weight_gradient = counted
    try:
        jobs.train(config, 1)
    finally:
        torch_linear._weight_gradient = ours
    return sum(added)
