"""What every conversion has in common: formats, what it will need, what it did."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert import work
from checkpoints_convert.file_writer import LARGEST_BLOCK, Digest
from checkpoints_convert.output import OutputFile
from checkpoints_convert.progress import (
    ConversionPrediction,
    digest_rate,
    free_bytes,
    peak_resident_bytes,
    trial_write_rate,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# Blocks of memory per worker. A worker uses a few: read, converted, written. The rest is what the allocator keeps of
# freed ones: an upper bound found by trial, which tests/checkpoints_convert/test_bounds.py compares with real
# processes.
_BLOCKS_IN_FLIGHT = 26
# glibc maps an allocation above this size by itself (M_MMAP_THRESHOLD grows up to it), and returns it when it is freed.
_RETURNED = 32 << 20
# Copies of larger rows: 3.4 were measured for a weight of 224 MiB in fp32 that was rounded to int8, packed and turned.
_COPIES = 8
# What a core reads, converts and writes in a second to memory: 1.26 GB/s were measured for two, with a hash of 10 GB/s.
# Slower disks decide.
_MOVED_PER_SECOND = 0.6e9
# Below this it takes less than two seconds at the rate above, and a file too small for a trial tells nothing.
_WORTH_A_TRIAL = 256_000_000


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Args:
        out: the directory.
        weight_bytes: bytes of all values.
        kept_bytes: of these, bytes that an earlier attempt had written.
        seconds: how long it took.
        complete_before: whether there was nothing to do.
        prediction: what it was said to need.
    """

    out: Path
    weight_bytes: int
    kept_bytes: int
    seconds: float
    complete_before: bool
    prediction: ConversionPrediction | None

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "out": str(self.out),
            "weight_bytes": self.weight_bytes,
            "kept_bytes": self.kept_bytes,
            "seconds": round(self.seconds, 3),
            "gb_per_second": round((self.weight_bytes - self.kept_bytes) / max(self.seconds, 1e-9) / 1e9, 4),
            "complete_before": self.complete_before,
            "predicted_peak_memory_bytes": self.prediction.peak_memory_bytes if self.prediction else None,
            "predicted_seconds": round(self.prediction.seconds, 1) if self.prediction else None,
        }


def predict(
    task: work.Work, files: Sequence[OutputFile], out: Path, *, new_digest: Callable[[], Digest], workers: int
) -> ConversionPrediction:
    """What is needed, from what is known before the first byte.

    Args:
        task: the work.
        files: what is to be written.
        out: the directory that will have them.
        new_digest: begins the hash of a file: SHA-256 costs more than all else where the CPU has no instruction for it.
        workers: files that are written at a time.
    """
    left = task.left_to_write(files)
    rate = trial_write_rate(task.notes, left) if left > _WORTH_A_TRIAL else None
    seconds = left * (1 / _MOVED_PER_SECOND + 1 / digest_rate(new_digest)) / min(workers, len(files))
    return ConversionPrediction(
        peak_memory_bytes=peak_resident_bytes() + workers * worker_bytes(files),
        disk_bytes=left,
        free_bytes=free_bytes(out.absolute().parent),
        seconds=max(seconds, left / rate) if rate else seconds,
        write_rate=rate,
    )


def worker_bytes(files: Sequence[OutputFile]) -> int:
    """Memory of a worker: blocks, which are larger where an encoding needs more rows at once."""
    outputs = [output for file in files for output in file.tensors]
    rows = max((output.unit_bytes for output in outputs if not output.held_bytes), default=0)
    held = max(output.held_bytes for output in outputs)
    return max(_BLOCKS_IN_FLIGHT * min(max(LARGEST_BLOCK, rows), _RETURNED), _COPIES * rows) + held
