"""Cuts a wheel's CUDA libraries down to the architectures that a cluster has.

A CUDA library holds its kernels once for every GPU generation, in "fat binaries": of the 276 MB of Transformer
Engine's core wheel one generation needs 30. The code of the others is overwritten with zeros, which a wheel packs to
nothing; the tables that the CUDA runtime reads stay as they are, and it never looks at code for another GPU.

Layout, as in the open tools that read it (cuobjdump's output says the same): a container is the magic number, its
version, the size of its header and of its content; an entry is its kind (1 PTX, 2 machine code), version, size of its
header, size of its code, and at byte 28 its architecture.
"""

import base64
import hashlib
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import atomic_path

_MAGIC, _SECTION = 0xBA55ED50, b".nv_fatbin"
_CONTAINER, _ENTRY = struct.Struct("<IHHQ"), struct.Struct("<HHIQ12xI")


@dataclass(frozen=True)
class DeviceCode:
    """One entry of a fat binary.

    Args:
        kind: 1 is PTX, 2 is machine code.
        architecture: such as 90.
        begin: first byte of the code in the library.
        stop: byte after its last.
    """

    kind: int
    architecture: int
    begin: int
    stop: int


def device_code(library: bytes | bytearray) -> Iterator[DeviceCode]:
    """Every entry of a shared library; nothing where it holds no kernels."""
    span = _fat_section(library)
    if span is None:
        return
    at, end = span
    while at + _CONTAINER.size <= end:
        magic, _, header, size = _CONTAINER.unpack_from(library, at)
        if magic != _MAGIC:
            at += 8  # between containers there is padding
            continue
        entry, stop = at + header, at + header + size
        while entry < stop:
            kind, _, entry_header, code, architecture = _ENTRY.unpack_from(library, entry)
            begin = entry + entry_header
            yield DeviceCode(kind, architecture, begin, begin + code)
            entry = begin + code
        at = stop


def _fat_section(library: bytes | bytearray) -> tuple[int, int] | None:
    """Where the fat binaries of a 64-bit ELF file lie."""
    if library[:5] != b"\x7fELF\x02":
        return None
    table, names_index = struct.unpack_from("<Q", library, 40)[0], struct.unpack_from("<H", library, 62)[0]
    size, count = struct.unpack_from("<HH", library, 58)
    sections = [struct.unpack_from("<IIQQQQ", library, table + size * number) for number in range(count)]
    names = sections[names_index][4]
    for name, _, _, _, offset, length in sections:
        if library[names + name : names + name + len(_SECTION) + 1] == _SECTION + b"\0":
            return offset, offset + length
    return None


def cut(library: bytes, keep: Sequence[int]) -> tuple[bytes, int]:
    """The library with zeros for the code of other architectures, and how many bytes of code are left.

    PTX of a newer GPU's compiler serves for every later one and is kept with the architectures named.

    Raises:
        DataError: nothing would be left.
    """
    result, left = bytearray(library), 0
    entries = list(device_code(library))
    for entry in entries:
        if entry.architecture in keep:
            left += entry.stop - entry.begin
        else:
            result[entry.begin : entry.stop] = bytes(entry.stop - entry.begin)
    if entries and not left:
        there = sorted({entry.architecture for entry in entries})
        raise DataError(Problem("--keep", list(keep), f"leaves no code: the library has {there}."))
    return bytes(result), left


def cut_wheel(wheel: Path, output: Path, keep: Sequence[int]) -> None:
    """Writes a wheel whose libraries hold code for some architectures only."""
    with (
        atomic_path(output) as partial,
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        records: dict[str, str] = {}
        # The record of all files comes last, with the new digests.
        for member in sorted(source.infolist(), key=lambda member: member.filename.endswith(".dist-info/RECORD")):
            content = source.read(member)
            if member.filename.endswith(".so"):
                content, _ = cut(content, keep)
                records[member.filename] = f"{member.filename},{_digest(content)},{len(content)}"
            elif member.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines()
                content = "".join(f"{records.get(line.rsplit(',', 2)[0], line)}\n" for line in lines).encode()
            target.writestr(member, content, zipfile.ZIP_DEFLATED, compresslevel=9)


def _digest(content: bytes) -> str:
    """As a wheel's RECORD has it (PEP 376)."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def main(arguments: Sequence[str]) -> int:
    """``python -m tools.fat_binary``: for tools/wheelhouse.sh."""
    parser = Parser(
        "tools.fat_binary",
        description="Cuts a wheel's CUDA libraries down to some architectures.",
        examples=["python -m tools.fat_binary transformer_engine_cu13.whl --keep 90 --output small/"],
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--keep", type=int, nargs="+", required=True, help="compute capabilities, such as 90 100")
    parser.add_argument("--output", type=Path, required=True, help="folder; the wheel keeps its name")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / options.wheel.name
    cut_wheel(options.wheel, target, options.keep)
    print(
        f"{options.wheel.name}: {options.wheel.stat().st_size / 1e6:.0f} MB, cut to {target.stat().st_size / 1e6:.0f}"
    )
    return 0


if __name__ == "__main__":
    run_program(main)
