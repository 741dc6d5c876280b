"""Causal self-attention in plain torch (SDPA), with context parallelism by gathering keys and values."""

import contextlib
import functools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_qwen.distributed.sequence import in_global_order
from megatron_qwen.estimate.cpu_attention import BLOCK
from megatron_qwen.models.sequences import PackedSequences
from megatron_qwen.models.torch_backend import batch_invariance
from megatron_qwen.models.torch_backend.causal_attention import BlockwiseCausalAttention, pays
from megatron_qwen.models.torch_backend.functions import RotateQKV


class TorchSelfAttention(SelfAttention):
    """megatron-core's self-attention with another path from the QKV projection to the context.

    Splitting, RoPE and the layout for SDPA are one operation with one gradient buffer. Parameters, sharding and
    checkpoint names are those of megatron-core.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, h] -> [s, b, h] and the bias of the output projection, which is None.

        Args:
            hidden_states: normalised input, [s / CP, b, h], and split over TP under sequence parallelism.
            attention_mask: not used; the mask is causal.
            rotary_pos_emb: angles, [s / CP, 1, 1, d]; of every position, not only this rank's, with packed sequences.
            packed_seq_params: the packed sequences of the row; None where the row is a single sequence.
        """
        assert packed_seq_params is None or isinstance(packed_seq_params, PackedSequences)
        mixed, _bias = self.linear_qkv(hidden_states)
        if self.checkpoint_core_attention:
            context = tensor_parallel.checkpoint(
                partial(self._context, sequences=packed_seq_params), False, mixed, rotary_pos_emb
            )
        else:
            context = self._context(mixed, rotary_pos_emb, sequences=packed_seq_params)
        projected: tuple[torch.Tensor, torch.Tensor | None] = self.linear_proj(context)
        return projected

    def _context(self, mixed: torch.Tensor, angles: torch.Tensor, *, sequences: PackedSequences | None) -> torch.Tensor:
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        slots = self.num_attention_heads_per_partition // groups + 2
        half = angles[:, 0, 0, : d // 2]
        if sequences is not None:
            half = half[sequences.positions]
        cos, sin = half.cos().to(mixed.dtype), half.sin().to(mixed.dtype)
        mixed = mixed.view(*mixed.shape[:2], groups, slots, d)
        if self.config.qk_layernorm:
            query, key, value = mixed.split((slots - 2, 1, 1), dim=3)
            mixed = torch.cat((self.q_layernorm(query), self.k_layernorm(key), value), dim=3)
        query, key, value = RotateQKV.apply(mixed, cos, sin)
        context: torch.Tensor = self.core_attention(query, key, value, sequences=sequences)
        return context


class TorchAttention(torch.nn.Module):
    """Core attention over scaled_dot_product_attention, on a CPU by ``causal_attention`` where that pays.

    With context parallelism a rank holds chunks r and 2 CP - 1 - r of the sequence (the load-balanced order
    of Transformer Engine). It gathers K and V of all ranks and lets each of its two query chunks attend to the
    prefix that ends with it; the gradient of K and V goes back by reduce-scatter. That is the all-gather scheme
    of Llama 3 (arXiv 2407.21783, section 3.3.2).

    Args:
        config: megatron-core's configuration; its attention dropout is read.
        softmax_scale: factor on the scores; None is 1 / sqrt(head dimension).
        pg_collection: groups; ``cp`` is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        assert pg_collection is not None
        self.layer_number = layer_number
        self.dropout = config.attention_dropout
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, sequences: PackedSequences | None = None
    ) -> torch.Tensor:
        """Causal attention.

        Args:
            query: [b, heads / TP, s / CP, d].
            key: [b, kv_heads / TP, s / CP, d].
            value: as ``key``.
            sequences: packed sequences, which attend only within themselves; None for a single sequence.

        Returns:
            [s / CP, b, heads / TP x d].
        """
        if self.cp_group.size() > 1:
            context = self._attend_gathered(query, key, value, sequences)
        elif sequences is not None:
            context = self._attend_each(query, key, value, sequences.lengths)
        else:
            context = self._attend(query, key, value)
        context = context.permute(2, 0, 1, 3)
        return context.reshape(*context.shape[:2], -1)

    def _attend_each(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]
    ) -> torch.Tensor:
        """Attention within each packed sequence, one call each: the work is the sum of the squared lengths."""
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._attend(*part) for part in parts], dim=2)

    def _attend_gathered(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: PackedSequences | None
    ) -> torch.Tensor:
        cp, rank = self.cp_group.size(), self.cp_group.rank()

        def whole(tensor: torch.Tensor) -> torch.Tensor:
            gathered = tensor_parallel.gather_from_sequence_parallel_region(
                tensor.permute(2, 0, 1, 3).contiguous(), group=self.cp_group
            )
            return in_global_order(gathered, cp).permute(1, 2, 0, 3)

        key, value = whole(key), whole(value)
        chunk = query.shape[2] // 2
        parts = []
        for index, part in zip((rank, 2 * cp - 1 - rank), query.split(chunk, dim=2), strict=True):
            end = (index + 1) * chunk
            mask = None if sequences is None else _same_sequence(sequences, end - chunk, end)
            parts.append(self._attend(part, key[:, :, :end], value[:, :, :end], mask))
        return torch.cat(parts, dim=2)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[b, heads, sq, d], [b, kv_heads, sk, d] -> [b, heads, sq, d]; the last query sees the last key."""
        dropout = self.dropout if self.training else 0.0
        whole_blocks = batch_invariance.is_on()
        if whole_blocks and (dropout or allowed is not None or query.shape[2] != key.shape[2]):
            raise ValueError("batch-invariant attention has neither dropout nor context parallelism")
        if allowed is None and not dropout and (whole_blocks or pays(query, key)):
            scale, length = self.scale or query.shape[3] ** -0.5, query.shape[2]
            if whole_blocks:
                query, key, value = (F.pad(part, (0, 0, 0, -length % BLOCK)) for part in (query, key, value))
            out: torch.Tensor = BlockwiseCausalAttention.apply(query, key, value, scale, torch.is_grad_enabled())
            return out[:, :, :length]
        mask = None
        if allowed is not None:
            mask = _causal(query.shape[2], key.shape[2], query.device) & allowed
        elif query.shape[2] != key.shape[2]:
            mask = _causal_bias(query.shape[2], key.shape[2], query.device, query.dtype)
        # TP ranks hold different heads, so their dropout must differ: fork their tensor-parallel generator.
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Attention holds no parameters."""
        return {}


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Which keys a query sees, [queries, keys]; the last sees them all."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


@functools.lru_cache(maxsize=2)  # a rank has two chunks of queries
def _causal_bias(queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The same as a bias, 0 or -inf. Cached so that layers share it: each would otherwise save its own for backward."""
    bias = torch.zeros(queries, keys, dtype=dtype, device=device)
    return bias.masked_fill_(~_causal(queries, keys, device), float("-inf"))


def _same_sequence(sequences: PackedSequences, first: int, stop: int) -> torch.Tensor:
    """Which of keys 0 .. stop - 1 are of the same sequence as queries first .. stop - 1, [stop - first, stop]."""
    bounds = sequences.cu_seqlens_q
    number = torch.bucketize(torch.arange(stop, device=bounds.device), bounds, right=True)
    return number[first:, None] == number[None, :]
