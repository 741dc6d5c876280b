"""Decompresses files. A truncated file is an error, never silently a shorter one."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from megatron_qwen.data.text.inputs import Compression, InputFile
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
    elif file.compression is Compression.GZIP:
        yield from _members(file, on_read, lambda: zlib.decompressobj(wbits=31), zlib.error)
    else:
        decompressor = zstandard.ZstdDecompressor()
        yield from _members(file, on_read, decompressor.decompressobj, zstandard.ZstdError)


def _members(
    file: InputFile, on_read: Callable[[int], None], begin: Callable[[], Any], damage: type[Exception]
) -> Iterator[bytes]:
    """Decompresses gzip members or zstd frames one after the other; the last must end with the file."""
    read, member = 0, begin()
    fresh = False
    with file.path.open("rb") as stream:
        while piece := stream.read(_PACKED_BYTES):
            read += len(piece)
            on_read(len(piece))
            try:
                while piece:
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
