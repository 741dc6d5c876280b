"""A library loses the code of other GPUs, keeps all that the CUDA runtime reads, and says when nothing is left."""

import base64
import hashlib
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.conftest import run
from tools.fat_binary import cut, device_code

KERNEL = "__global__ void add(float *x, float y) { x[threadIdx.x] += y; }\n"


def entry(architecture: int, code: bytes, kind: int = 2) -> bytes:
    """One entry: a header of 64 bytes, then code."""
    return struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(code), architecture) + code


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(*containers: bytes) -> bytes:
    """The least 64-bit ELF file with a section for fat binaries."""
    names = b"\0.shstrtab\0.nv_fatbin\0"
    body = (b"\0" * 24).join(containers)
    at = 64 + len(names)
    at += -at % 8
    content = names.ljust(at - 64, b"\0") + body
    table = 64 + len(content)

    def section(name: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    sections = section(0, 0, 0) + section(1, 64, len(names)) + section(11, at, len(body))
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 1)
    return header + content + sections


def test_keeps_one_architecture():
    old, new = b"\x11" * 40, b"\x22" * 56
    whole = library(container(entry(80, old), entry(90, new)), container(entry(90, new), entry(100, old)))
    assert [(code.architecture, whole[code.begin : code.stop]) for code in device_code(whole)] == [
        (80, old),
        (90, new),
        (90, new),
        (100, old),
    ]
    small, left = cut(whole, [90])
    assert left == 2 * len(new)
    assert len(small) == len(whole)
    assert [whole[c.begin : c.stop] == small[c.begin : c.stop] for c in device_code(small)] == [
        False,
        True,
        True,
        False,
    ]
    outside = bytearray(whole)
    for code in device_code(whole):
        if code.architecture != 90:
            outside[code.begin : code.stop] = bytes(code.stop - code.begin)
    assert small == bytes(outside)


def test_other_files_stay_as_they_are():
    for content in (b"", b"text", b"\x7fELF\x01" + bytes(80)):
        assert cut(content, [90]) == (content, 0)


def wheel(folder: Path, content: bytes) -> Path:
    path = folder / "some-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some/lib.so", content)
        archive.writestr("some-1.dist-info/RECORD", "some/lib.so,sha256=old,1\nsome/__init__.py,sha256=kept,6\n")
        archive.writestr("some/__init__.py", "x = 1\n")
    return path


def test_a_wheel(tmp_path):
    source = wheel(tmp_path, library(container(entry(80, b"\x11" * 40), entry(90, b"\x22" * 56))))
    done = run("tools.fat_binary", source, "--keep", "90", "--output", tmp_path / "small", check=True)
    assert "some-1-py3-none-any.whl" in done.stdout
    with zipfile.ZipFile(tmp_path / "small" / source.name) as archive:
        assert archive.read("some/__init__.py") == b"x = 1\n"
        content = archive.read("some/lib.so")
        assert b"\x11" not in content
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        first, second = archive.read("some-1.dist-info/RECORD").decode().splitlines()
        assert first == f"some/lib.so,sha256={digest},{len(content)}"
        assert second == "some/__init__.py,sha256=kept,6"


def test_nothing_left_is_an_error(tmp_path):
    source = wheel(tmp_path, library(container(entry(80, b"\x11" * 40))))
    done = run("tools.fat_binary", source, "--keep", "90", "--output", tmp_path / "small")
    assert done.returncode == 3
    assert "leaves no code: the library has [80]" in done.stderr
    assert not list((tmp_path / "small").iterdir())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed; the layout is also tested without it")
def test_what_nvcc_makes(tmp_path):
    (tmp_path / "add.cu").write_text(KERNEL)
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    command = ["nvcc", "-shared", "-Xcompiler", "-fPIC", *targets, "-o", "add.so", "add.cu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    whole = (tmp_path / "add.so").read_bytes()
    assert {code.architecture for code in device_code(whole)} == {80, 90}
    small, left = cut(whole, [90])
    assert 0 < left < sum(code.stop - code.begin for code in device_code(whole))
    assert {c.architecture for c in device_code(small) if any(small[c.begin : c.stop])} == {90}
