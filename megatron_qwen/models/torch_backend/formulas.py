"""The torch backend's memory-bound operations as plain formulas in fp32, which torch.compile fuses to one kernel each.

Each computes the same as an operation of functions.py or objectives/cross_entropy.py, which work in place for runs
without a compiler. The last two transpose operands for dense_gemm.py.
"""

import torch
import torch.nn.functional as F


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up, [n, 2 f] -> [n, f]."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def swiglu_gradient(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of the input, [n, 2 f], from the gradient of the output, [n, f]."""
    gate, up = x.float().chunk(2, dim=-1)
    wide, share = gradient.float(), torch.sigmoid(gate)
    active = gate * share
    # silu(g) = g sigmoid(g), and its derivative is sigmoid(g) + silu(g) (1 - sigmoid(g)).
    return torch.cat((wide * up * (share + active * (1 - share)), wide * active), dim=-1).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) x weight, [n, h], and 1 / rms(x), [n, 1] in fp32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype), scale


def rms_norm_gradient(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, [n, h], and of the weight, [h], from the gradient of the output, [n, h]."""
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
    """Gradient of the QKV projection from those of Q, K and V, in the shapes of ``rotate_qkv``."""
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
    """Cross-entropy of each row, [n]; overwrites the logits by the gradient of the weighted sum, [n, v].

    Args:
        logits: [n, v].
        index: column of each row's target, [n].
        mine: whether the target is among these columns, [n].
        weights: of each row's loss, [n].
        valid: columns without the vocabulary padding.
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
    """Adds part' to ``total`` in place, [k, m] to [m, k]."""
    return total.add_(part.t())
