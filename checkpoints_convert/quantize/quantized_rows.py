"""Parts of a quantized linear, solved on their own."""

import torch

from checkpoints_convert.formats.quantized_linear import QuantizedLinear


def join_rows(parts: list[QuantizedLinear]) -> QuantizedLinear:
    """A linear of parts that hold consecutive rows."""
    return QuantizedLinear(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        parts[0].group_of,
    )
