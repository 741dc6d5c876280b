"""Room on the disk for solved layers and hidden states: required before the first layer, and missed with a message."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.formats.quantized_linear import Grid
from checkpoints_convert.progress import free_bytes, gb
from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.errors import DiskFullError, Problem
from megatron_qwen.resilience.storage import names_full

_PACKED_BITS = 4  # two codes in a byte; all others take one each
_ZERO_BYTES = 1


def solved_bytes(weights: TensorSet, grid: Grid | None) -> int:
    """Bytes of all solved layers of a model; those of tensors that are not quantized are left out, as small.

    Args:
        weights: of the model.
        grid: of its quantized weights; None where only statistics of columns are kept.
    """
    if grid is None:
        return 0
    total = 0
    for name, info in weights.tensors.items():
        if is_quantized(name):
            rows, columns = info.shape
            groups = 1 if grid.group is None else columns // grid.group
            codes = rows * columns // 2 if grid.bits <= _PACKED_BITS else rows * columns
            total += codes + rows * groups * (grid.scale_dtype.itemsize + _ZERO_BYTES)
    return total


def require_room(directory: Path, needed: int) -> None:
    """Raises DiskFullError if ``needed`` bytes do not fit next to what is there."""
    free = free_bytes(directory)
    if needed > free:
        fix = f"{needed:,} bytes ({gb(needed)}) are needed for the calibration and {free:,} are free; make room or "
        raise DiskFullError(Problem(str(directory), None, fix + "choose another disk."))


@contextmanager
def full_disk_told(directory: Path) -> Iterator[None]:
    """Makes of the errors of a full disk one that says what is kept.

    Raises:
        DiskFullError: the body met a full disk or quota. safetensors has a class of its own for that, too.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if not names_full(str(error)):
            raise
        fix = (
            f"the disk is full ({free_bytes(directory):,} bytes are free). Layers that are solved are kept; free some "
            "space and run the same command again."
        )
        raise DiskFullError(Problem(str(directory), None, fix)) from None
