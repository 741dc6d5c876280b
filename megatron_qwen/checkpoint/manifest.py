"""The manifest of a checkpoint: size and xxh3-128 of every file, so that damage is found and named.

A shard also has hashes of its parts: each slice of a weight, and the bytes between them. A reader that needs only the
weights verifies just these, and not the optimizer state, which is six times as large (fp32 main weight and two fp32
moments: 12 bytes per parameter, against 2 of a bf16 weight).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import orjson
import xxhash

from megatron_qwen.checkpoint.paths import GENERATORS, MANIFEST, RUN_YAML, STATE, TOKENIZER
from megatron_qwen.errors import Problem

_CHUNK = 1 << 22
# What a reader of checkpoints takes, besides the tokenizer: ours, torch's, megatron-core's.
_SHARDS = (".distcp", ".safetensors")
_NAMES = (RUN_YAML, STATE, GENERATORS, ".metadata", "metadata.json", "common.pt")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and xxh3-128 (hex) of one file.

    Args:
        size: its bytes.
        xxh3_128: of the whole.
        parts: bytes and hash of consecutive parts, which together are the file; empty where only the whole is hashed.
    """

    size: int
    xxh3_128: str
    parts: tuple[tuple[int, str], ...] = ()

    def spans(self) -> Iterator[tuple[int, int, str]]:
        """Every part as (first byte, bytes, hash)."""
        start = 0
        for length, digest in self.parts:
            yield start, length, digest
            start += length


def hash_file(path: Path, cuts: Sequence[int] = ()) -> FileEntry:
    """Reads a file once.

    Args:
        path: the file.
        cuts: places at which a new part begins; none hashes the whole only.
    """
    whole, size = xxhash.xxh3_128(), 0
    parts: list[tuple[int, str]] = []
    with path.open("rb") as file:
        for stop in [*sorted({cut for cut in cuts if cut}), None]:
            part, begin = xxhash.xxh3_128(), size
            while stop is None or size < stop:
                chunk = file.read(_CHUNK if stop is None else min(_CHUNK, stop - size))
                if not chunk:
                    break
                whole.update(chunk)
                part.update(chunk)
                size += len(chunk)
            if size > begin:
                parts.append((size - begin, part.hexdigest()))
    return FileEntry(size, whole.hexdigest(), tuple(parts) if cuts else ())


def files_in(directory: Path) -> list[str]:
    """Relative names of all files but the manifest, sorted."""
    names = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    return sorted(name for name in names if name != MANIFEST)


def _render(content: dict[str, Any]) -> bytes:
    """The manifest's bytes, which end in a checksum of the rest."""
    body = {key: value for key, value in content.items() if key != "checksum"}
    checksum = xxhash.xxh3_128_hexdigest(orjson.dumps(body))
    return orjson.dumps({**body, "checksum": checksum}, option=orjson.OPT_INDENT_2)


def _noted(entry: FileEntry) -> dict[str, Any]:
    noted: dict[str, Any] = {"size": entry.size, "xxh3_128": entry.xxh3_128}
    return noted | {"parts": [list(part) for part in entry.parts]} if entry.parts else noted


def _entry(noted: dict[str, Any]) -> FileEntry:
    parts = tuple((int(length), str(digest)) for length, digest in noted.get("parts", ()))
    entry = FileEntry(int(noted["size"]), str(noted["xxh3_128"]), parts)
    if parts and sum(length for length, _ in parts) != entry.size:
        raise ValueError("the parts are not the file")
    return entry


def write(directory: Path, entries: dict[str, FileEntry], *, iteration: int, attempt: int) -> None:
    """Writes manifest.json."""
    content = {
        "format": 1,
        "iteration": iteration,
        "attempt": attempt,
        "files": {name: _noted(entry) for name, entry in sorted(entries.items())},
    }
    (directory / MANIFEST).write_bytes(_render(content))


def read(directory: Path) -> dict[str, FileEntry] | Problem:
    """The entries of a manifest, or what is wrong with it."""
    path = directory / MANIFEST
    try:
        written = path.read_bytes()
        content = orjson.loads(written)
        if _render(content) != written:
            return Problem(str(path), None, "does not match its own checksum: the file is damaged.")
        return {name: _entry(noted) for name, noted in content["files"].items()}
    except FileNotFoundError:
        return Problem(
            str(path), None, "is missing: the checkpoint was never committed, or is partly deleted; use another one."
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Problem(str(path), None, "is damaged.")


def damage(directory: Path, names: Iterable[str] | None = None) -> list[Problem]:
    """Every file that is missing, or whose size or hash differs from the manifest.

    Args:
        directory: a checkpoint.
        names: only these files. None: all files, and files that the manifest does not list are problems too.
    """
    entries = read(directory)
    if isinstance(entries, Problem):
        return [entries]
    found: list[Problem] = []
    for name in entries if names is None else names:
        found += _file_damage(directory / name, entries[name])
    if names is None:
        found += unknown_files(directory, entries)
    return found


def unknown_files(directory: Path, entries: dict[str, FileEntry]) -> list[Problem]:
    """Files of a checkpoint's kind that its manifest does not list: another writer was there.

    What nothing reads is left alone: a note, or what file systems and desktops leave (.nfs0001, .DS_Store).
    """
    return [
        Problem(str(directory / name), None, "is not in the manifest.")
        for name in files_in(directory)
        if name not in entries and _would_be_read(name)
    ]


def _would_be_read(name: str) -> bool:
    path = PurePath(name)
    if path.parts[0] == TOKENIZER:
        return not path.name.startswith(".")
    return path.suffix in _SHARDS or name in _NAMES


def _file_damage(path: Path, entry: FileEntry) -> list[Problem]:
    if not path.is_file():
        return [Problem(str(path), None, "is missing.")]
    if (size := path.stat().st_size) != entry.size:
        return [Problem(str(path), f"{size} bytes", f"should have {entry.size} bytes: cut off or changed.")]
    try:
        found = hash_file(path)
    except OSError as error:
        return [Problem(str(path), None, f"cannot be read ({error.strerror}).")]
    if found.xxh3_128 != entry.xxh3_128:
        return [Problem(str(path), None, "has other bytes than when it was written: damaged.")]
    return []
