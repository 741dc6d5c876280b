"""Causal attention in plain torch (SDPA), with context parallelism by gathering keys and values."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_qwen.distributed.sequence import in_global_order


class TorchAttention(torch.nn.Module):
    """Core attention over scaled_dot_product_attention.

    With context parallelism a rank holds chunks r and 2 CP - 1 - r of the sequence (the load-balanced order
    of Transformer Engine). It gathers K and V of all ranks and lets each of its two query chunks attend to the
    prefix that ends with it; the gradient of K and V goes back by reduce-scatter. That is the all-gather scheme
    of Llama 3 (arXiv 2407.21783, section 3.3.2).

    Args:
        config: the core's configuration.
        softmax_scale: factor on the scores; None is 1 / sqrt(head dimension).
        pg_collection: groups; ``cp`` is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self" and pg_collection is not None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attends.

        Args:
            query: [s / CP, b, heads / TP, d].
            key: [s / CP, b, kv_heads / TP, d].
            value: as ``key``.

        Returns:
            [s / CP, b, heads / TP x d].
        """
        assert attention_bias is None and packed_seq_params is None
        if self.cp_group.size() == 1:
            context = self._attend(query, key, value)
        else:
            context = self._attend_gathered(query, key, value)
        return context.reshape(*context.shape[:2], -1)

    def _attend_gathered(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (
            in_global_order(tensor_parallel.gather_from_sequence_parallel_region(tensor, group=self.cp_group), cp)
            for tensor in (key, value)
        )
        chunk = query.shape[0] // 2
        parts = []
        for index, part in zip((rank, 2 * cp - 1 - rank), query.split(chunk), strict=True):
            end = (index + 1) * chunk
            parts.append(self._attend(part, key[:end], value[:end]))
        return torch.cat(parts)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[sq, b, heads, d], [sk, b, kv_heads, d] -> [sq, b, heads, d]; the last query sees the last key."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, d]
        mask = None
        if q.shape[2] != k.shape[2]:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(k.shape[2] - q.shape[2])
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return context.permute(2, 0, 1, 3)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Attention holds no parameters."""
        return {}

