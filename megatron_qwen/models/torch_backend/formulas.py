"""The torch backend's small operations as formulas in fp32, for a compiler that makes one kernel of each.

Each is what an operation of functions.py or loss.py computes step by step, in place and without a compiler;
the last two move what dense_gemm.py multiplies.
"""

import torch
import torch.nn.functional as F


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up, [n, 2 f] -> [n, f]."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def swiglu_gradient(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of its input, [n, 2 f], by that of its output, [n, f]."""
    gate, up = x.float().chunk(2, dim=-1)
    wide, share = gradient.float(), torch.sigmoid(gate)
    active = gate * share
    return torch.cat((wide * up * (share + active * (1 - share)), wide * active), dim=-1).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) x weight, [n, h], and 1 / rms(x), [n, 1] in fp32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype), scale


def rms_norm_gradient(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, [n, h], and of the weight, [h], by that of the output, [n, h]."""
    normal, wide = x.float() * scale, gradient.float()
    grad_normal = wide * weight.float()
    grad_x = (grad_normal - normal * (grad_normal * normal).mean(dim=-1, keepdim=True)) * scale
    return grad_x.to(x.dtype), (wide * normal).sum(dim=0).to(weight.dtype)


def rotate_qkv(
    mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[s, b, groups, q heads of a group + 2, d] -> Q [b, heads, s, d], K and V [b, groups, s, d]; RoPE on Q and K."""
    by_head = mixed.permute(1, 2, 3, 0, 4)
    query = _rotated(by_head[:, :, :-2], cos, sin).contiguous().flatten(1, 2)
    return query, _rotated(by_head[:, :, -2], cos, sin).contiguous(), by_head[:, :, -1].contiguous()


def rotate_qkv_gradient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Gradient of the joint projection by those of Q, K and V, which have the shapes of ``rotate_qkv``."""
    grouped = _rotated(query.unflatten(1, (key.shape[1], -1)), cos, -sin)
    parts = (grouped, _rotated(key, cos, -sin).unsqueeze(2), value.unsqueeze(2))
    return torch.cat(parts, dim=2).permute(3, 0, 1, 2, 4).contiguous()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of [..., s, d] by angles [s, d / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def loss_and_gradient_(
    logits: torch.Tensor, index: torch.Tensor, mine: torch.Tensor, weights: torch.Tensor, valid: int
) -> torch.Tensor:
    """Cross-entropy of each row, [n]; the gradient of the weighted sum takes the logits' place, [n, v].

    Args:
        logits: [n, v].
        index: column of each row's target, [n].
        mine: whether there is one, [n].
        weights: of each row's loss, [n].
        valid: columns that are no padding.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    wide = logits.float().masked_fill(columns >= valid, float("-inf"))
    largest = wide.amax(dim=1, keepdim=True)
    chosen = (wide.gather(1, index.unsqueeze(1)) - largest).squeeze(1).masked_fill(~mine, 0.0)
    exponentials = torch.exp(wide - largest)
    sums = exponentials.sum(dim=1)
    target = (columns == index.unsqueeze(1)) * (mine * weights).unsqueeze(1)
    logits.copy_(exponentials * (weights / sums).unsqueeze(1) - target)
    return sums.log() - chosen


def transposed(x: torch.Tensor) -> torch.Tensor:
    """[n, k] -> [k, n], contiguous."""
    return x.t().contiguous()


def add_transposed_(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """total + part', [m, k] and [k, m], in the place of ``total``."""
    return total.add_(part.t())
