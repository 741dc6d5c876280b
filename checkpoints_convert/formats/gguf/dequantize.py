"""Values of the blocks of a GGUF tensor, through the numpy functions of the ``gguf`` package.

They are written apart from the C functions of the library that quantizes, so a fault of one is not a fault of both.
"""

import numpy as np
import torch

from checkpoints_convert.formats.gguf.types import GgmlType
from megatron_qwen.errors import ConversionError, Problem

_PLAIN = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}


def dequantize(data: torch.Tensor, kind: GgmlType) -> torch.Tensor:
    """float32 [rows, columns] of rows of bytes, uint8 [rows, bytes of a row].

    Raises:
        ConversionError: the type is quantized and the gguf package is not installed.
    """
    if kind in _PLAIN:
        return data.view(_PLAIN[kind]).float()
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        fix = "is not installed; the values of quantized GGUF tensors are computed by it: pip install gguf."
        raise ConversionError(Problem("gguf", None, fix)) from None
    with np.errstate(all="ignore"):  # damaged scales may be infinite
        values = quants.dequantize(data.numpy(), GGMLQuantizationType(int(kind)))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
