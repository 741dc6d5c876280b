"""Checks what a conversion does not read, so that no part of a damaged checkpoint is released as a whole one."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from checkpoints_convert.checkpoint_source import CheckpointSource, damaged
from checkpoints_convert.progress import ByteProgress
from megatron_qwen.errors import CheckpointError, Problem

_BUFFER = 1 << 22
_DONE = ".checked"
Part = tuple[str, int, int, str]


def check_unread(
    source: CheckpointSource, parts: Sequence[Part], notes: Path, *, workers: int, progress: ByteProgress
) -> None:
    """Compares the parts of a checkpoint that hold no weights with the hashes of its manifest, once a conversion.

    Args:
        source: the checkpoint.
        parts: (file, first byte, bytes, hash).
        notes: folder of the conversion where it is noted that this is done.
        workers: parts read at a time.
        progress: told of every byte.

    Raises:
        CheckpointError: with everything that is damaged in the whole checkpoint.
    """
    done = notes / _DONE
    if done.is_file():
        progress.add(sum(length for _, _, length, _ in parts))
        return
    require_whole(source, parts, workers=workers, progress=progress)
    done.touch()


def require_whole(source: CheckpointSource, parts: Sequence[Part], *, workers: int, progress: ByteProgress) -> None:
    """Compares parts of a checkpoint with the hashes of its manifest.

    Raises:
        CheckpointError: with everything that is damaged in the whole checkpoint.
    """

    def is_whole(part: Part) -> bool:
        name, start, length, noted = part
        digest, left = xxhash.xxh3_128(), length
        with (source.path / name).open("rb", buffering=0) as file:
            file.seek(start)
            while left and (data := file.read(min(left, _BUFFER))):
                digest.update(data)
                left -= len(data)
                progress.add(len(data))
        return digest.hexdigest() == noted

    with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
        if not all(pool.map(is_whole, parts)):
            changed = Problem(str(source.path), None, "changed while it was read; try again.")
            raise damaged(source.path, CheckpointError(changed))
