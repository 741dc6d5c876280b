"""Packed sequences: several sequences concatenated in one row (THD), without attention between them."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSequences(PackedSeqParams):
    """megatron-core's PackedSeqParams for the te backend, with two fields for the torch backend.

    Args:
        lengths: tokens of each sequence, in order; their sum is s. Integers on the host, so that splitting a row by
            them does not wait for the device.
        positions: position of each of this rank's tokens within its sequence, [s / CP]; selects the RoPE angles.
    """

    lengths: tuple[int, ...] = ()
    positions: torch.Tensor | None = None


def packed_sequences(cu_seqlens: torch.Tensor, lengths: tuple[int, ...], positions: torch.Tensor) -> PackedSequences:
    """Describes the sequences of a row.

    Args:
        cu_seqlens: cumulative lengths: start of each sequence, then the length of the row; int32, [sequences + 1].
        lengths: tokens of each sequence.
        positions: position of each of this rank's tokens within its sequence, [s / CP].
    """
    longest = max(lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        positions=positions,
    )
