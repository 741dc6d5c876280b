"""Causal attention on a CPU, by batched GEMMs over blocks of queries.

torch's own CPU kernel reaches a fifth to a third of the speed of a plain GEMM. Here the query heads that share a key
head are rows of one GEMM, and a block of queries meets only the keys up to its end. The probabilities are kept for
the backward pass: recomputing them, as FlashAttention does (Dao, arXiv 2307.08691), would cost a fifth to a third of
the time. To save that memory, recompute attention (training.recompute_modules=core_attn).
"""

from typing import Any

import torch

from megatron_qwen.estimate import cpu_attention
from megatron_qwen.estimate.cpu_attention import BLOCK


def pays(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether it is faster than torch's own kernel.

    Args:
        query: [b, heads, sq, d].
        key: [b, kv_heads, sk, d].
    """
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return query.device.type == "cpu" and cpu_attention.pays(scores, key.shape[2])


class BlockwiseCausalAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v, where the last query sees the last key. Scores and their softmax are in fp32."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, training: bool
    ) -> torch.Tensor:
        """Attends.

        Args:
            ctx: of autograd.
            query: [b, heads, sq, d].
            key: [b, kv_heads, sk, d], sk at least sq.
            value: as ``key``.
            scale: factor on the scores.
            training: whether a backward pass will come; in here autograd is always off.

        Returns:
            [b, heads, sq, d], in memory [sq, b, heads, d] as the projection wants it.
        """
        earlier = key.shape[2] - query.shape[2]
        scaled, keys, values = query.float() * scale, key.float().flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
        later = torch.full((BLOCK, BLOCK), float("-inf"), device=query.device).triu_(1)
        b, heads, queries, d = query.shape
        out = query.new_empty(queries, b, heads, d).permute(1, 2, 0, 3)
        kept = []
        for start, stop in _blocks(query):
            block, seen = stop - start, earlier + stop
            scores = torch.bmm(_rows(scaled, key, start, stop), keys[:, :, :seen])
            scores.view(scores.shape[0], -1, block, seen)[..., -block:] += later[:block, :block]
            weights = torch._softmax(scores, -1, False).to(values.dtype)
            _put(out, start, stop, torch.bmm(weights, values[:, :seen]))
            if training:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value, in their shapes and formats."""
        query, key, value, *kept = ctx.saved_tensors
        keys, values, dtype = key.flatten(0, 1), value.flatten(0, 1), query.dtype
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(keys.shape, dtype=torch.float32, device=key.device) for _ in range(2))
        for (start, stop), weights in zip(_blocks(query), kept, strict=True):
            seen = weights.shape[2]
            rows, grad = _rows(query, key, start, stop), _rows(grad_out, key, start, stop)
            grad_value[:, :seen] += torch.bmm(weights.transpose(1, 2), grad)
            grad_weights = torch.bmm(grad, values[:, :seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, dtype, grad_input=grad_weights)
            _put(grad_query, start, stop, torch.bmm(grad_scores, keys[:, :seen]))
            grad_key[:, :seen] += torch.bmm(grad_scores.transpose(1, 2), rows)
        grad_key *= ctx.scale
        return (
            grad_query.mul_(ctx.scale),
            grad_key.to(dtype).view_as(key),
            grad_value.to(dtype).view_as(value),
            None,
            None,
        )


def _blocks(query: torch.Tensor) -> list[tuple[int, int]]:
    """First query of each block, and the first of the next."""
    queries = query.shape[2]
    return [(start, min(start + BLOCK, queries)) for start in range(0, queries, BLOCK)]


def _rows(tensor: torch.Tensor, key: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A block of queries, [b x kv_heads, heads of a key head x block, d]."""
    b, heads, _, d = tensor.shape
    groups = key.shape[1]
    return tensor[:, :, start:stop].reshape(b * groups, heads // groups * (stop - start), d)


def _put(out: torch.Tensor, start: int, stop: int, rows: torch.Tensor) -> None:
    """Writes a block of queries to ``out``; the inverse of ``_rows``."""
    b, heads, _, d = out.shape
    out[:, :, start:stop] = rows.view(b, heads, stop - start, d)
