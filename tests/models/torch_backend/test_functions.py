"""The hand-written backward passes are those of autograd."""

import pytest
import torch
import torch.nn.functional as F

from megatron_qwen.models.torch_backend.functions import RMSNormFunction, RotateQKV, SwiGLU


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_swiglu():
    torch.manual_seed(0)
    x = doubles(3, 2, 10)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(SwiGLU.apply(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, (x,))


def test_rms_norm():
    torch.manual_seed(1)
    x, weight = torch.randn(5, 2, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    reference = F.rms_norm(x, (16,), weight, 1e-6)
    ours = RMSNormFunction.apply(x, weight, 1e-6)
    torch.testing.assert_close(ours, reference)
    gradient = torch.randn_like(reference)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, weight), gradient),
        torch.autograd.grad(reference, (x, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_rms_norm_bf16_is_as_near_as_torch():
    torch.manual_seed(2)
    x, weight = torch.randn(64, 256), torch.rand(256) + 0.5
    exact = F.rms_norm(x, (256,), weight, 1e-6)
    half = (x.bfloat16(), weight.bfloat16())
    ours = (RMSNormFunction.apply(*half, 1e-6).float() - exact).abs().mean()
    theirs = (F.rms_norm(half[0], (256,), half[1], 1e-6).float() - exact).abs().mean()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("groups", [1, 2])
def test_rotate_qkv(groups):
    torch.manual_seed(3)
    s, b, heads, d = 6, 2, 2, 8
    mixed = doubles(s, b, groups, heads + 2, d)
    angles = torch.arange(s)[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)[None]
    cos, sin = angles.cos().double(), angles.sin().double()

    def reference(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        full_cos, full_sin = torch.cat((cos, cos), -1)[:, None, None], torch.cat((sin, sin), -1)[:, None, None]

        def rotate(part: torch.Tensor) -> torch.Tensor:
            first, second = part.chunk(2, dim=-1)
            return part * full_cos + torch.cat((-second, first), -1) * full_sin

        query = rotate(x[:, :, :, :-2].reshape(s, b, -1, d))
        return tuple(part.permute(1, 2, 0, 3) for part in (query, rotate(x[:, :, :, -2]), x[:, :, :, -1]))

    for found, expected in zip(RotateQKV.apply(mixed, cos, sin), reference(mixed), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda x: RotateQKV.apply(x, cos, sin), (mixed,))
