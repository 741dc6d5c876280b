"""Finds the input files: names, folders, patterns and lists of them, each of a known format."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_qwen.errors import DataError, Problem


class FileFormat(StrEnum):
    """How documents are stored in a file; the value is the ending."""

    JSONL = ".jsonl"
    TXT = ".txt"
    PARQUET = ".parquet"


class Compression(StrEnum):
    """How a file is compressed; the value is the ending."""

    PLAIN = ""
    GZIP = ".gz"
    ZSTD = ".zst"


@dataclass(frozen=True)
class InputFile:
    """A file of documents.

    Args:
        path: of the file.
        format: how documents are stored in it.
        compression: how it is compressed.
        size: bytes on disk.
    """

    path: Path
    format: FileFormat
    compression: Compression
    size: int


def find_inputs(names: Sequence[str | Path]) -> list[InputFile]:
    """The input files, in the order in which they are read.

    Args:
        names: a file; a folder (every file of a known format below it, sorted by name); a pattern with ``*``, ``?`` or
            ``[`` (``**`` matches folders), sorted; or ``@list``, a file with one of these on every line.

    Raises:
        DataError: with every name that is missing, empty, unreadable or of an unknown format.
    """
    found: list[InputFile] = []
    problems: list[Problem] = []
    for path in _expand(names, problems):
        kind = _kind(path)
        if kind is None:
            fix = (
                f"is none of {', '.join(FileFormat)}, plain or with {' or '.join(filter(None, Compression))} after it."
            )
            problems.append(Problem(str(path), path.suffix, fix))
        elif (size := path.stat().st_size) == 0:
            problems.append(Problem(str(path), None, "is empty."))
        else:
            found.append(InputFile(path, *kind, size))
    times = Counter(file.path for file in found)
    problems += [
        Problem(str(path), None, "is named twice, so its documents would be used twice; remove one of the two.")
        for path, count in times.items()
        if count > 1
    ]
    if problems:
        raise DataError(problems)
    return found


def _kind(path: Path) -> tuple[FileFormat, Compression] | None:
    ending = path.suffix.lower()
    compression = Compression(ending) if ending in (Compression.GZIP, Compression.ZSTD) else Compression.PLAIN
    form = Path(path.stem).suffix.lower() if compression else ending
    if form not in list(FileFormat) or (form == FileFormat.PARQUET and compression):
        return None
    return FileFormat(form), compression


def _expand(names: Sequence[str | Path], problems: list[Problem]) -> Iterator[Path]:
    for name in map(str, names):
        path = Path(name)
        if name.startswith("@"):
            yield from _listed(Path(name[1:]), problems)
        elif path.is_dir():
            below = sorted(item for item in path.rglob("*") if item.is_file() and _kind(item) is not None)
            if not below:
                problems.append(Problem(name, None, f"contains no file of the formats {', '.join(FileFormat)}."))
            yield from below
        elif path.is_file():
            yield path
        elif glob.has_magic(name):
            matches = sorted(match for match in _glob(name) if match.is_file())
            if not matches:
                problems.append(Problem(name, None, "matches no file."))
            yield from matches
        else:
            problems.append(Problem(name, None, "no such file."))


def _glob(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    return Path(path.anchor).glob(str(path.relative_to(path.anchor)))


def _listed(path: Path, problems: list[Problem]) -> Iterator[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        problems.append(Problem(f"@{path}", None, f"the list cannot be read ({error.strerror})."))
        return
    except UnicodeDecodeError:
        problems.append(Problem(f"@{path}", None, "the list is not UTF-8 text."))
        return
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    nested = [name for name in names if name.startswith("@")]
    problems += [Problem(f"@{path}", name, "a list cannot name another list.") for name in nested]
    yield from _expand([name for name in names if not name.startswith("@")], problems)
