"""Causal attention on a CPU, by batched products over blocks of queries.

torch's own CPU kernel reaches a fifth to a third of the speed of a plain product. Here the query heads that share a key
head are rows of one product, a block of queries meets only the keys up to its end, and, as in FlashAttention
(Dao, arXiv 2307.08691), the backward pass computes the probabilities again: nothing as large as the scores is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch

_BLOCK = 64  # queries; fewer waste less on what is masked, more make larger products
# Scores of fewer are done before a dozen operations are called; those of more keys leave the cache between two of them.
_LEAST_SCORES, _MOST_KEYS = 2**20, 1024


def pays(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether it is faster than torch's own kernel, by shapes that were tried on two cores of an AMD EPYC.

    Args:
        query: [b, heads, sq, d].
        key: [b, kv_heads, sk, d].
    """
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return query.device.type == "cpu" and scores >= _LEAST_SCORES and key.shape[2] <= _MOST_KEYS


class BlockwiseCausalAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v, where the last query sees the last key. Scores and probabilities are in fp32."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Attends.

        Args:
            ctx: of autograd.
            query: [b, heads, sq, d].
            key: [b, kv_heads, sk, d], sk at least sq.
            value: as ``key``.
            scale: factor on the scores.

        Returns:
            [b, heads, sq, d].
        """
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        ctx.scale = scale
        values = value.flatten(0, 1)
        for start, stop, weights in _probabilities(query, key, scale):
            _put(out, key, start, stop, torch.bmm(weights.to(values.dtype), values[:, : weights.shape[2]]))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        """Gradients of query, key and value."""
        query, key, value, out = ctx.saved_tensors
        # What a row of probabilities takes off each of its gradients: sum(p dp) is out . dout.
        mean_grad = (out.float() * grad_out).sum(-1, keepdim=True)
        keys, values, dtype = key.flatten(0, 1), value.flatten(0, 1), query.dtype
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(keys.shape, dtype=torch.float32, device=key.device) for _ in range(2))
        for start, stop, weights in _probabilities(query, key, ctx.scale):
            seen = weights.shape[2]
            rows, grad = _rows(query, key, start, stop), _rows(grad_out, key, start, stop)
            grad_value[:, :seen] += torch.bmm(weights.to(dtype).transpose(1, 2), grad)
            grad_weights = torch.bmm(grad, values[:, :seen].transpose(1, 2)) - _rows(mean_grad, key, start, stop)
            grad_scores = grad_weights.mul_(weights).to(dtype)
            _put(grad_query, key, start, stop, torch.bmm(grad_scores, keys[:, :seen]))
            grad_key[:, :seen] += torch.bmm(grad_scores.transpose(1, 2), rows)
        grad_key *= ctx.scale
        return grad_query.mul_(ctx.scale), grad_key.to(dtype).view_as(key), grad_value.to(dtype).view_as(value), None


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Each block of queries, its first and last, and their probabilities, [b x kv_heads, rows, keys up to its end]."""
    queries, earlier = query.shape[2], key.shape[2] - query.shape[2]
    scaled, keys = query.float() * scale, key.float().flatten(0, 1).transpose(1, 2)
    later = torch.full((_BLOCK, _BLOCK), float("-inf"), device=query.device).triu_(1)
    for start in range(0, queries, _BLOCK):
        stop = min(start + _BLOCK, queries)
        block, seen = stop - start, earlier + stop
        scores = torch.bmm(_rows(scaled, key, start, stop), keys[:, :, :seen])
        scores.view(scores.shape[0], -1, block, seen)[..., -block:] += later[:block, :block]
        yield start, stop, torch._softmax(scores, -1, False)


def _rows(tensor: torch.Tensor, key: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A block of queries, [b x kv_heads, heads of a key head x block, d]."""
    b, heads, _, d = tensor.shape
    groups = key.shape[1]
    return tensor[:, :, start:stop].reshape(b * groups, heads // groups * (stop - start), d)


def _put(out: torch.Tensor, key: torch.Tensor, start: int, stop: int, rows: torch.Tensor) -> None:
    """The way back from ``_rows``."""
    b, heads, _, d = out.shape
    out[:, :, start:stop] = rows.view(b, heads, stop - start, d)
