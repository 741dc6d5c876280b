"""A piece: what one rank holds, as a file in safetensors' format whose name has the hash of its bytes.

A node that loses power leaves files cut off, and memory flips bits, so a piece counts only where its bytes have the
hash of its name. There is no pickle in it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from megatron_qwen.files import publish, temporary_name

CHUNK = 16 << 20  # bytes that are hashed, written and sent at a time; chosen by hand
_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
_OF_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_NAME = re.compile(
    r"iter_(\d+)\.attempt_(\d+)\.rank_(\d+)_of_(\d+)\.layout_([0-9a-f]{16})\.([0-9a-f]{32})\.(own|held)\.safetensors"
)
_PREFIX, _METADATA, _FACTS = 8, "__metadata__", "facts"


class PieceError(Exception):
    """A piece that cannot be used, with the reason."""


@dataclass(frozen=True, order=True)
class PieceName:
    """What the name of a piece says.

    Args:
        iteration: of the run.
        attempt: that wrote it.
        rank: whose state it is.
        world_size: ranks of the run.
        layout: hash of everything that decides how the state is divided over ranks.
        digest: xxh3-128 of the file, in hex.
        kept: own, by the node of the rank; held, by the node of its partner.
    """

    iteration: int
    attempt: int
    rank: int
    world_size: int
    layout: str
    digest: str
    kept: Literal["own", "held"] = "own"

    def __str__(self) -> str:
        whose = f"rank_{self.rank}_of_{self.world_size}.layout_{self.layout}"
        return f"iter_{self.iteration:07d}.attempt_{self.attempt}.{whose}.{self.digest}.{self.kept}.safetensors"

    @classmethod
    def of(cls, text: str) -> "PieceName | None":
        """From a file's name; None where it is none of a piece."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        iteration, attempt, rank, world = map(int, match.groups()[:4])
        kept: Literal["own", "held"] = "own" if match[7] == "own" else "held"
        return cls(iteration, attempt, rank, world, match[5], match[6], kept)

    def as_held(self) -> "PieceName":
        """The name of the copy on another node."""
        return replace(self, kept="held")


@dataclass
class StagedPiece:
    """A copy of a rank's tensors in host memory, which the next piece of the same size uses again.

    Args:
        header: safetensors' length and header.
        data: uint8, [bytes of all tensors].
    """

    header: bytes = b""
    data: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data.numel()

    def fill(self, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]], facts: Mapping[str, Any]) -> None:
        """Copies tensors from wherever they are.

        Args:
            tensors: gives them with their names, the same every time. It is called twice: some are made for the
                occasion, and all of them at once may not fit.
            facts: what JSON can hold.
        """
        described = {name: (tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in tensors()}
        header: dict[str, Any] = {_METADATA: {_FACTS: json.dumps(facts)}}
        end = 0
        # The widest first, as safetensors lays them out: then every value is aligned.
        for name, (dtype, shape, size) in sorted(described.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        if self.data.numel() != end:
            self.data = torch.empty(end, dtype=torch.uint8)
        for name, tensor in tensors():
            begin, stop = header[name]["data_offsets"]
            self.data[begin:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _PREFIX)
        self.header = len(text).to_bytes(_PREFIX, "little") + text

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the file, CHUNK at a time from its beginning."""
        data = memoryview(self.data.numpy())
        first = max(0, CHUNK - len(self.header))
        yield memoryview(self.header + bytes(data[:first]))
        for begin in range(first, len(data), CHUNK):
            yield data[begin : begin + CHUNK]


class PieceWriter:
    """Writes a piece and hashes it; a failure is kept until ``finish``, so that a peer that sends is not left alone.

    Args:
        directory: where the piece goes; it exists.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._temporary = temporary_name(directory / "piece")
        self._hash = xxhash.xxh3_128()
        self._failure: OSError | None = None
        self._file: FileIO | None = None
        try:
            self._file = self._temporary.open("wb", buffering=0)
        except OSError as error:
            self._failure = error

    def write(self, data: memoryview) -> None:
        """Appends bytes."""
        self._hash.update(data)
        if self._failure is not None or self._file is None:
            return
        try:
            while len(data):
                data = data[self._file.write(data) :]
        except OSError as error:
            self._failure = error

    def digest(self) -> str:
        """xxh3-128 of what was written."""
        return self._hash.hexdigest()

    def finish(self, name: PieceName) -> None:
        """Gives the file its name, which makes it a piece.

        Raises:
            OSError: it could not be written; nothing is left of it.
            PieceError: it has other bytes than its name says.
        """
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._failure = self._failure or error
        if self._failure is not None or self.digest() != name.digest:
            self.abandon()
            raise self._failure or PieceError(f"{name} arrived with other bytes than were sent")
        # Not synced: it is to survive a lost process or node, and a node that lost power is replaced by its partner.
        publish(self._temporary, self._directory / str(name))

    def abandon(self) -> None:
        """Removes what was written."""
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def read_bytes(path: Path) -> torch.Tensor:
    """The bytes of a piece, uint8, compared with the hash of its name.

    Raises:
        PieceError: it is not there, cannot be read or has other bytes.
    """
    name = PieceName.of(path.name)
    assert name is not None, path
    try:
        with path.open("rb", buffering=0) as file:
            content = torch.empty(path.stat().st_size, dtype=torch.uint8)
            view, hashed, end = memoryview(content.numpy()), xxhash.xxh3_128(), 0
            while end < len(view):
                count = file.readinto(view[end : end + CHUNK])
                if not count:
                    break
                hashed.update(view[end : end + count])
                end += count
    except OSError as error:
        raise PieceError(f"{path} cannot be read ({error.strerror})") from None
    if end != len(view) or hashed.hexdigest() != name.digest:
        raise PieceError(f"{path} has other bytes than when it was written")
    return content


def is_whole(content: torch.Tensor, name: PieceName) -> bool:
    """Whether these bytes have the hash of the name."""
    return xxhash.xxh3_128_hexdigest(memoryview(content.numpy())) == name.digest


def parse(content: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, as views of the bytes, and facts of a piece.

    Raises:
        PieceError: it is not in safetensors' format.
    """
    try:
        length = int.from_bytes(bytes(content[:_PREFIX].tolist()), "little")
        header = json.loads(bytes(memoryview(content[_PREFIX : _PREFIX + length].numpy())))
        facts: dict[str, Any] = json.loads(header.pop(_METADATA)[_FACTS])
        data = content[_PREFIX + length :]
        tensors = {
            name: data[entry["data_offsets"][0] : entry["data_offsets"][1]]
            .view(_OF_NAMES[entry["dtype"]])
            .view(entry["shape"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise PieceError(f"its header cannot be read ({type(error).__name__})") from None
    return tensors, facts
