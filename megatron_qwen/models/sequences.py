"""Independent sequences laid end to end in one row: none attends to another, and positions begin anew in each."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class SeparateSequences(PackedSeqParams):
    """What megatron-core's and Transformer Engine's packed attention takes, and what the torch backend takes beside it.

    Args:
        lengths: of the sequences, in order; they fill the row.
        positions: position of each of this rank's tokens in its own sequence, [s / CP].
    """

    lengths: tuple[int, ...] = ()
    positions: torch.Tensor | None = None


def separate_sequences(bounds: torch.Tensor, lengths: tuple[int, ...], positions: torch.Tensor) -> SeparateSequences:
    """Describes the sequences of a row.

    Args:
        bounds: where sequences begin, and the length of the row, int32, [sequences + 1].
        lengths: of the sequences.
        positions: position of each of this rank's tokens in its own sequence, [s / CP].
    """
    longest = max(lengths)
    return SeparateSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        positions=positions,
    )
