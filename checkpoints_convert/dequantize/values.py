"""Whether the small tensors of a quantized weight hold what a format can have."""

from collections.abc import Iterator

import torch

from checkpoints_convert.dequantize.stored import StoredTensors

_BLOCK_BYTES = 1 << 24


def row_blocks(stored: StoredTensors, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor from top to bottom: (first row, rows), of about 16 MiB at most."""
    entry = stored.entries[name]
    if not entry.shape:
        yield 0, stored.whole(name).reshape(1)
        return
    rows = entry.shape[0]
    step = max(1, _BLOCK_BYTES // max(1, entry.size // max(1, rows)))
    for start in range(0, rows, step):
        yield start, stored.rows(name, start, min(rows, start + step))


def scale_fault(stored: StoredTensors, name: str) -> str | None:
    """What is wrong with scales: they must be finite and above zero, or what they scale is lost."""
    for start, block in row_blocks(stored, name):
        values = block.float()
        bad = ~(values.isfinite() & (values > 0))
        if bad.any():
            place = bad.reshape(bad.shape[0], -1).any(dim=1).nonzero()[0].item()
            value = float(values[bad][0])
            return (
                f"holds the scale {value:g} in row {start + int(place):,}; every scale must be finite and above 0: "
                "quantize the weight again."
            )
    return None


def index_fault(stored: StoredTensors, name: str, *, groups: int) -> str | None:
    """What is wrong with the group of every column."""
    values = stored.whole(name)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= groups:
        return f"names groups from {low} to {high}; the weight has groups 0 to {groups - 1}."
    return None
