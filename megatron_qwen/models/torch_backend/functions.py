"""Forward and backward passes of the memory-bound operations between the GEMMs, written for few passes over memory.

Autograd's own backward of a slice or a split writes a full-size tensor for every part and then adds them. On a CPU
these copies cost more than the arithmetic, so each operation here fills one gradient buffer in place. In runs with
``performance.compile`` each is one kernel (formulas.py).
"""

from typing import Any

import torch
import torch.nn.functional as F

from megatron_qwen.models.torch_backend import formulas
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS


class SwiGLU(torch.autograd.Function):
    """silu(gate) x up, for a tensor [..., 2 f] that concatenates gate and up (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """[..., 2 f] -> [..., f]."""
        ctx.save_for_backward(x)
        return swiglu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """[..., f] -> [..., 2 f]."""
        return swiglu_gradient(ctx.saved_tensors[0], gradients[0])


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up, [..., 2 f] -> [..., f]; without autograd."""
    if x.shape[:-1].numel() > 1 and (kernel := PROCESS_KERNELS.of(formulas.swiglu)):
        return kernel(x.flatten(0, -2)).view(*x.shape[:-1], x.shape[-1] // 2)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_gradient(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of its input [..., 2 f], in one buffer, by that of its output [..., f]."""
    if x.shape[:-1].numel() > 1 and (kernel := PROCESS_KERNELS.of(formulas.swiglu_gradient)):
        return kernel(x.flatten(0, -2), gradient.flatten(0, -2)).view_as(x)
    gate, up = x.chunk(2, dim=-1)
    result = torch.empty_like(x)
    grad_gate, grad_up = result.chunk(2, dim=-1)
    torch.mul(F.silu(gate), gradient, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=grad_gate)
    return result


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) x weight over the last dimension, statistics in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        out, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """d/dx: scale x (g w - x_hat mean(g w x_hat)); d/dw: sum over tokens of g x_hat."""
        x, weight, scale = ctx.saved_tensors
        gradient = gradients[0]
        if kernel := PROCESS_KERNELS.of(formulas.rms_norm_gradient):
            grad_x, grad_weight = kernel(x.flatten(0, -2), weight, scale.flatten(0, -2), gradient.flatten(0, -2))
            return grad_x.view_as(x), grad_weight, None
        normal = x * scale.to(x.dtype)
        grad_weight = (gradient * normal).flatten(0, -2).sum(dim=0, dtype=torch.float32)
        grad_normal = gradient * weight
        projection = torch.linalg.vecdot(grad_normal, normal).unsqueeze(-1).div_(-x.shape[-1])
        grad_x = grad_normal.addcmul_(normal, projection).mul_(scale.to(x.dtype))
        return grad_x, grad_weight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) x weight, [..., h], and 1 / rms(x), [..., 1] in fp32; without autograd."""
    if kernel := PROCESS_KERNELS.of(formulas.rms_norm):
        out, scale = kernel(x.flatten(0, -2), weight, eps)
        return out.view_as(x), scale.view(*x.shape[:-1], 1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    scaled: torch.Tensor = x * scale.to(x.dtype)
    return scaled.mul_(weight), scale


class RotateQKV(torch.autograd.Function):
    """Splits the QKV projection into Q, K and V in the layout of attention, and applies RoPE to Q and K.

    RoPE rotates channel i against channel i + d / 2 (Su et al. 2021, in the half-split form of GPT-NeoX that the
    Qwen family uses).
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``rotate_qkv``."""
        ctx.save_for_backward(cos, sin)
        ctx.mixed_shape = mixed.shape
        return rotate_qkv(mixed, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of ``mixed``: the inverse rotation (-sin), written into one buffer."""
        cos, sin = ctx.saved_tensors
        s, b, groups, slots, d = ctx.mixed_shape
        grad_query, grad_key, grad_value = gradients
        if kernel := PROCESS_KERNELS.of(formulas.rotate_qkv_gradient):
            return kernel(grad_query, grad_key, grad_value, cos, sin), None, None
        result = grad_query.new_empty(ctx.mixed_shape)
        by_head = result.permute(1, 2, 3, 0, 4)
        _rotate(grad_query.view(b, groups, slots - 2, s, d), cos, -sin, out=by_head[:, :, :-2])
        _rotate(grad_key, cos, -sin, out=by_head[:, :, -2])
        by_head[:, :, -1].copy_(grad_value)
        return result, None, None


def rotate_qkv(
    mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits and rotates; without autograd.

    Args:
        mixed: output of linear_qkv, [s, b, groups, query heads per group + 2, d]; the last two are key and value.
        cos: [s, d / 2].
        sin: [s, d / 2].

    Returns:
        Q [b, heads, s, d], K [b, groups, s, d], V [b, groups, s, d].
    """
    if kernel := PROCESS_KERNELS.of(formulas.rotate_qkv):
        return kernel(mixed, cos, sin)
    s, b, groups, slots, d = mixed.shape
    by_head = mixed.permute(1, 2, 3, 0, 4)  # [b, groups, slots, s, d]
    query = mixed.new_empty(b, groups, slots - 2, s, d)
    key = mixed.new_empty(b, groups, s, d)
    _rotate(by_head[:, :, :-2], cos, sin, out=query)
    _rotate(by_head[:, :, -2], cos, sin, out=key)
    return query.view(b, -1, s, d), key, by_head[:, :, -1].contiguous()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor) -> None:
    """Writes RoPE of x to ``out``, both [..., s, d]: the pair (i, i + d / 2) is rotated by its angle."""
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
