"""Decompresses files. A truncated file is an error, never silently a shorter one."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from megatron_qwen.data.text.formats import Compression, InputFile
from megatron_qwen.errors import DataError, Problem

_PLAIN_BYTES = 1 << 22
# Small, because the output of one call is unbounded: a block of zeros expands ten-thousandfold.
_PACKED_BYTES = 1 << 13


def unpacked(file: InputFile, on_read: Callable[[int], None]) -> Iterator[bytes]:
    """The content of a file, piece by piece.

    Args:
        file: what to read.
        on_read: called with the number of bytes just read from disk.

    Raises:
        DataError: the file is damaged or truncated.
    """
    if file.compression is Compression.PLAIN:
        with file.path.open("rb") as stream:
            while piece := stream.read(_PLAIN_BYTES):
                on_read(len(piece))
                yield piece
    else:
        begin, damage = _DECOMPRESSORS[file.compression]
        yield from _members(file, on_read, begin, damage)


# zstd --long=31 asks for a window of 2 GiB, the format's largest; the library's own limit is 128 MiB.
_LARGEST_WINDOW = 1 << 31
_DECOMPRESSORS: dict[Compression, tuple[Callable[[], Any], type[Exception]]] = {
    Compression.GZIP: (lambda: zlib.decompressobj(wbits=31), zlib.error),
    Compression.ZSTD: (
        lambda: zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj(),
        zstandard.ZstdError,
    ),
    Compression.BZIP2: (bz2.BZ2Decompressor, OSError),
    Compression.XZ: (lzma.LZMADecompressor, lzma.LZMAError),
}


def _members(
    file: InputFile, on_read: Callable[[int], None], begin: Callable[[], Any], damage: type[Exception]
) -> Iterator[bytes]:
    """Decompresses gzip members, or zstd frames, or streams, one after the other; the last must end with the file.

    Zeros after a member are padding: xz allows it, and tapes and block devices leave it after gzip.
    """
    read, member = 0, begin()
    fresh = False
    with file.path.open("rb") as stream:
        while piece := stream.read(_PACKED_BYTES):
            read += len(piece)
            on_read(len(piece))
            try:
                while piece:
                    if fresh and not (piece := piece.lstrip(b"\0")):
                        break
                    content = member.decompress(piece)
                    fresh, piece = False, b""
                    if member.eof:
                        piece, member, fresh = member.unused_data, begin(), True
                    if content:
                        yield content
            except damage as error:
                fix = f"is damaged near byte {read} ({error}); download it again."
                raise DataError(Problem(str(file.path), None, fix)) from None
    if not fresh:
        fix = f"is truncated after {read} bytes, in the middle of its compressed data; download it again."
        raise DataError(Problem(str(file.path), None, fix))
