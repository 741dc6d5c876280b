"""What quantized tensors stand for, bit by bit from the formats' descriptions, without the code that wrote them."""

from collections.abc import Mapping

import torch

# Output of its eight that place k of an AWQ word holds, from the lowest bits.
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def code(word: int, place: int, bits: int) -> int:
    return (word >> (bits * place)) & ((1 << bits) - 1)


def gptq_value(tensors: Mapping[str, torch.Tensor], out: int, column: int, *, bits: int, stored_less: int) -> float:
    """One weight. ``stored_less`` is 1 in the first version of the format, 0 in the second."""
    places = 32 // bits
    group = int(tensors["g_idx"][column])
    q = code(int(tensors["qweight"][column // places, out]), column % places, bits)
    z = code(int(tensors["qzeros"][group, out // places]), out % places, bits) + stored_less
    return (q - z) * float(tensors["scales"][group, out])


def awq_value(tensors: Mapping[str, torch.Tensor], out: int, column: int, *, group: int) -> float:
    place = AWQ_PLACES.index(out % 8)
    q = code(int(tensors["qweight"][column, out // 8]), place, 4)
    z = code(int(tensors["qzeros"][column // group, out // 8]), place, 4)
    return (q - z) * float(tensors["scales"][column // group, out])


def w4a16_value(tensors: Mapping[str, torch.Tensor], out: int, column: int, *, group: int) -> float:
    q = code(int(tensors["weight_packed"][out, column // 8]), column % 8, 4) - 8
    return q * float(tensors["weight_scale"][out, column // group])


def per_row(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """w8a8, and fp8 per channel: float32 [out, in]."""
    return tensors["weight"].float() * tensors["weight_scale"].float()


def per_block(tensors: Mapping[str, torch.Tensor], scale: str) -> torch.Tensor:
    """FP8 in blocks of 128 x 128: float32 [out, in]."""
    rows, columns = tensors["weight"].shape
    scales = tensors[scale].float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return tensors["weight"].float() * scales
