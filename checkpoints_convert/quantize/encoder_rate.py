"""How fast each format rounds and packs rows that are in memory: what bounds a release on a fast disk.

``python -m checkpoints_convert.quantize.encoder_rate ROWS COLUMNS`` prints bytes of bf16 a second by format, as JSON.
"""

import json
import sys
import time

import torch

from checkpoints_convert.formats.quantized_format import QuantizedFormat
from checkpoints_convert.formats.registry import FORMATS

_MEASURED_S = 0.5
_STD = 0.02


def encoder_rate(format_: QuantizedFormat, *, rows: int, columns: int) -> float:
    """Bytes of bf16 a second that become all tensors of a format, with this process's threads.

    Args:
        format_: the format.
        rows: of a block; a multiple of 128.
        columns: of the weight.
    """
    encoding = format_.encoding()
    values = (torch.randn(rows, columns) * _STD).bfloat16()
    encoded, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < _MEASURED_S or not encoded:
        # Every tensor reads and encodes the rows for itself.
        for part, made in encoding.tensors((rows, columns)).items():
            if made.value is None:
                encoding.encode(values, name="weight")[part].contiguous()
        encoded += values.numel() * values.itemsize
    return encoded / seconds


if __name__ == "__main__":
    _rows, _columns = map(int, sys.argv[1:])
    print(json.dumps({name: encoder_rate(one, rows=_rows, columns=_columns) for name, one in FORMATS.items()}))
