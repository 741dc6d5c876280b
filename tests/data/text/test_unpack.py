"""What compressors and their users make of a file is read; what is cut off or damaged is refused."""

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.text.unpack import unpacked
from megatron_qwen.errors import DataError

TEXT = b'{"text": "some words"}\n' * 5000
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
# A frame that a decoder passes over; pzstd writes one before each frame (RFC 8878, 3.1.2).
SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"abcd"


def content(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    (file,) = find_inputs([str(path)]).files
    return b"".join(unpacked(file, lambda _: None))


@pytest.mark.parametrize("ending", PACKED)
def test_several_members(ending, tmp_path):
    data = PACKED[ending](TEXT) + PACKED[ending](b"") + PACKED[ending](TEXT[:7])
    assert content(tmp_path / f"x.jsonl{ending}", data) == TEXT + TEXT[:7]


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("zeros", [4, 9000])
def test_zeros_after_the_end_are_padding(ending, zeros, tmp_path):
    """As a tape's or a block device's last block has them; xz and gzip ignore them as well."""
    assert content(tmp_path / f"x.jsonl{ending}", PACKED[ending](TEXT) + bytes(zeros)) == TEXT


@pytest.mark.parametrize("ending", PACKED)
def test_a_cut_or_damaged_file_is_refused(ending, tmp_path):
    whole = PACKED[ending](TEXT)
    for data, why in ((whole[:-3], "truncated"), (whole[:5], "truncated"), (whole + b"no member", "damaged")):
        with pytest.raises(DataError, match=why):
            content(tmp_path / f"x.jsonl{ending}", data)


def test_frames_that_a_decoder_passes_over(tmp_path):
    frame = zstandard.compress(TEXT)
    for data in (SKIPPABLE + frame, frame + SKIPPABLE, SKIPPABLE + frame + SKIPPABLE + frame):
        assert content(tmp_path / "x.jsonl.zst", data) == TEXT * data.count(frame)


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_windows_up_to_the_largest_of_the_format(window_log, tmp_path):
    """As ``zstd --long=31`` asks for; the header says it whatever the size of the file."""
    writer = zstandard.ZstdCompressor().compressobj()
    data = bytearray(writer.compress(TEXT) + writer.flush())
    assert not data[4] & 0x20, "the header has a window"
    data[5] = (window_log - 10) << 3
    assert content(tmp_path / "x.jsonl.zst", bytes(data)) == TEXT
