"""A file that was interrupted anywhere is completed to the same bytes, whatever encodes its rows."""

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from checkpoints_convert.encoding import SAME_NAME, Cast, EncodedTensor
from checkpoints_convert.file_writer import FileWriter, Stopped, Written
from checkpoints_convert.output import OutputFile, encoded_tensors, safetensors_file
from checkpoints_convert.progress import ByteProgress
from tests.checkpoints_convert.encodings import Int8Blocks, Int8Rows, Int8Tensor, PackedColumns, Scattered

BLOCK = 150


def planned() -> OutputFile:
    """A file of weights of every kind of encoding; each attempt plans it anew, as a new process does."""
    values = torch.randn(14, 8, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    spans = Scattered(values, (3, 5, 6)).spans
    encodings = (Int8Rows(), Int8Blocks(), PackedColumns(), Int8Tensor(spans), Cast(torch.float32))
    return safetensors_file(
        "model.safetensors",
        [
            output
            for number, encoding in enumerate(encodings)
            for output in encoded_tensors(f"{number}.weight", tuple(values.shape), spans, encoding)
        ],
    )


class StopAfter(ByteProgress):
    """Stops the writers after some blocks."""

    def __init__(self, stop: threading.Event, *, blocks: int | None) -> None:
        super().__init__(1, quiet=True)
        self._stop, self._left = stop, blocks
        self.add(0)

    def add(self, count: int) -> None:
        if count and self._left is not None:
            self._left -= 1
        if self._left == 0:
            self._stop.set()
        super().add(count)


def write(folder: Path, *, stop_after: int | None = None) -> tuple[Written | None, int]:
    """One attempt: what it wrote, if it came to the end, and the bytes of values that it wrote or kept."""
    stop = threading.Event()
    progress = StopAfter(stop, blocks=stop_after)
    writer = FileWriter(
        planned(),
        folder / "file",
        folder / "journal",
        new_digest=hashlib.sha256,
        block=BLOCK,
        progress=progress,
        stop=stop,
    )
    try:
        return writer.write(), progress.done
    except Stopped:
        return None, progress.done


@pytest.fixture
def complete(tmp_path):
    """What an attempt without an interruption leaves."""
    folder = tmp_path / "complete"
    folder.mkdir()
    done, _ = write(folder)
    content = (folder / "file").read_bytes()
    assert len(content) == planned().size
    assert done is not None
    assert done.digest == hashlib.sha256(content).hexdigest()
    return folder, done, content


def resumed(folder: Path, complete: tuple[Path, Written, bytes]) -> int:
    """The next attempt ends with the same bytes and hashes; bytes of values that it kept."""
    _, expected, _ = complete
    done, _ = write(folder)
    assert hashlib.sha256((folder / "file").read_bytes()).hexdigest() == expected.digest
    assert done is not None
    assert (done.digest, done.tensors, done.parts) == (expected.digest, expected.tensors, expected.parts)
    return done.kept_bytes


def test_stopped_at_every_block(complete, tmp_path):
    blocks = sum(len(output.blocks(BLOCK)) for output in planned().tensors)
    assert blocks > 20
    for number in range(blocks):
        folder = tmp_path / str(number)
        folder.mkdir()
        done, written = write(folder, stop_after=number)
        assert done is None
        # Every byte of the first attempt is kept: the next one begins at the block that was not written.
        assert resumed(folder, complete) == written
        assert (written > 0) == (number > 0)


def test_stopped_after_every_block_of_one_conversion(complete, tmp_path):
    """Each attempt reads back what the earlier ones left and writes one block more."""
    folder, attempts, kept = tmp_path / "often", 0, 0
    folder.mkdir()
    while True:
        # The progress is told of each tensor that is kept, and then of one block.
        tensors = {line.split()[0] for line in journal(folder)}
        done, written = write(folder, stop_after=len(tensors) + 1)
        attempts += 1
        if done is not None:
            break
        assert written > kept
        kept = written
    assert attempts > 20
    assert (folder / "file").read_bytes() == complete[2]
    assert done.digest == complete[1].digest


def journal(folder: Path) -> list[str]:
    path = folder / "journal"
    return path.read_text().splitlines() if path.is_file() else []


@dataclass(frozen=True)
class Left:
    """What a kill or a power loss left of a file: bytes of it, characters of its journal, a byte that changed."""

    length: int
    noted: int
    changed: int | None = None


def states(size: int, noted: int) -> list[Left]:
    cut = [Left(length, noted) for length in range(0, size, 37)]
    forgotten = [Left(size, characters) for characters in range(0, noted, 61)]
    return cut + forgotten + [Left(size, noted, changed) for changed in range(0, size, 41)]


def test_whatever_a_kill_leaves(complete, tmp_path):
    folder, _, content = complete
    noted = (folder / "journal").read_text()
    kept = []
    for number, left in enumerate(states(len(content), len(noted))):
        attempt = tmp_path / str(number)
        attempt.mkdir()
        there = bytearray(content[: left.length])
        if left.changed is not None:
            there[left.changed] ^= 1
        (attempt / "file").write_bytes(there)
        (attempt / "journal").write_text(noted[: left.noted])
        kept.append(resumed(attempt, complete))
    assert len(set(kept)) > 10, "nothing, or everything, was kept each time"


@dataclass(frozen=True)
class Wrong:
    """An encoding that makes other tensors than it announces."""

    dtype: torch.dtype = torch.float32
    rows: int = 1
    block_rows: int = 1
    working_dtype: torch.dtype = torch.float32

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        return {SAME_NAME: EncodedTensor(shape, torch.float32)}

    def encode(self, rows: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        return {SAME_NAME: rows.repeat(self.rows, 1).to(self.dtype)}


@pytest.mark.parametrize("wrong", [Wrong(dtype=torch.int32), Wrong(rows=2)])
def test_an_encoding_that_does_not_fit_its_header_is_found(wrong, tmp_path):
    spans = Scattered(torch.zeros(6, 4), (6,)).spans
    file = safetensors_file("model.safetensors", encoded_tensors("a.weight", (6, 4), spans, wrong))
    progress = ByteProgress(1, quiet=True)
    places = (tmp_path / "file", tmp_path / "journal")
    writer = FileWriter(
        file, *places, new_digest=hashlib.sha256, block=BLOCK, progress=progress, stop=threading.Event()
    )
    with pytest.raises(AssertionError, match=r"a\.weight"):
        writer.write()
