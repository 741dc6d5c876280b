"""Finds the input files: names, folders, patterns and lists of them. What is not read is told, with the reason."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from megatron_qwen.data.text.folders import LINK_TO_NOTHING, NO_FILE, files_below, matches
from megatron_qwen.data.text.formats import (
    KNOWN_ENDINGS,
    Compression,
    FileFormat,
    InputFile,
    format_of,
    may_be_one_value,
    why_no_data,
)
from megatron_qwen.data.text.unpack import unpacked
from megatron_qwen.errors import DataError, Problem

_FIRST_BYTES = 1 << 16
_NAMED = 5


@dataclass(frozen=True)
class LeftOut:
    """Something below a folder, or matched by a pattern, that is not read.

    Args:
        path: of it.
        why: the reason.
    """

    path: Path
    why: str


@dataclass
class Inputs:
    """What was found for the names that a user gave.

    Args:
        files: in the order in which they are read.
        left_out: everything else that lies there.
    """

    files: list[InputFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def __str__(self) -> str:
        """What is left out, a line for each reason; empty if everything is read."""
        return "\n".join(
            f"not read: {len(paths):,} {'file' if len(paths) == 1 else 'files'} ({why}): "
            f"{', '.join(map(str, paths[:_NAMED]))}{', ...' if len(paths) > _NAMED else ''}"
            for why, paths in _by_reason(self.left_out).items()
        )


def find_inputs(names: Sequence[str | Path], *, text_field: str = "text") -> Inputs:
    """The input files.

    Args:
        names: a file; a folder (every file of a known format below it, sorted by name, links followed); a pattern with
            ``*``, ``?`` or ``[`` (``**`` matches folders), sorted; or ``@list``, a file with one of these on every
            line.
        text_field: field of the text in JSON lines. A ``.json`` file below a folder whose first record lacks it is
            about the data, such as a ``dataset_info.json``.

    Raises:
        DataError: with every name that is missing, empty, unreadable or of an unknown format.
    """
    search = _Search(text_field)
    for name in map(str, names):
        search.add(name)
    if search.problems:
        raise DataError(search.problems)
    return search.found


class _Search:
    def __init__(self, text_field: str) -> None:
        self.found, self.problems = Inputs(), list[Problem]()
        self._text_field = text_field
        self._by: dict[str, tuple[str, Path]] = {}  # of a file's real path: the name that it was found by, its own name

    def add(self, name: str, *, in_list: str | None = None) -> None:
        """Finds what one name stands for."""
        path = Path(name)
        if name.startswith("@"):
            if in_list is not None:
                self.problems.append(Problem(in_list, name, "a list cannot name another list."))
                return
            for line in _listed(Path(name[1:]), self.problems):
                self.add(line, in_list=name)
        elif path.is_dir():
            self._several(name, lambda: self._below(path), f"contains no file that can be read: {KNOWN_ENDINGS}")
        elif path.is_file():
            self._one(name, path)
        elif path.exists():
            fix = (
                "is a pipe or a device; write it to a file first, because inputs are read in parts and more than once."
            )
            self.problems.append(Problem(name, None, fix))
        elif glob.has_magic(name):
            self._several(name, lambda: self._matching(name), "matches no file that can be read")
        else:
            fix = "is a link to nothing." if path.is_symlink() else "no such file."
            self.problems.append(Problem(name, None, fix))

    def _one(self, name: str, path: Path) -> None:
        """A file that was named itself: whatever speaks against it is an error."""
        if (kind := format_of(path)) is None:
            self.problems.append(Problem(name, path.suffix or None, f"is none of {KNOWN_ENDINGS}."))
            return
        if (why := self._no_documents(path, kind, others_fields=True)) is not None:
            self.problems.append(Problem(name, None, f"{why}."))
            return
        self._take(name, path, kind)

    def _several(self, name: str, find: Callable[[], Iterable[tuple[Path, Path]]], none: str) -> None:
        """Files below a folder, or that a pattern matches."""
        files, left_out, problems = len(self.found.files), len(self.found.left_out), len(self.problems)
        try:
            for path, inside in find():
                self._consider(name, path, inside)
        except OSError as error:
            self.problems.append(Problem(str(error.filename or name), None, f"cannot be read ({error.strerror})."))
            return
        if len(self.found.files) == files and len(self.problems) == problems:
            there = Inputs(left_out=self.found.left_out[left_out:])
            told = f"; {'; '.join(str(there).splitlines())}" if there.left_out else ""
            self.problems.append(Problem(name, None, f"{none}{told}."))

    def _below(self, folder: Path) -> Iterator[tuple[Path, Path]]:
        """Files below a folder, and where in it they lie."""
        return ((path, path.relative_to(folder)) for path in files_below(folder, self._leave_out))

    def _matching(self, pattern: str) -> Iterator[tuple[Path, Path]]:
        met: set[str] = set()  # of data/**/*, files are matched, and lie in folders that are
        for match in matches(pattern):
            files = self._below(match) if match.is_dir() else [(match, Path(match.name.lstrip(".")))]
            for path, inside in files:
                if (real := os.path.realpath(path)) not in met:
                    met.add(real)
                    yield path, inside

    def _consider(self, name: str, path: Path, inside: Path) -> None:
        if not path.is_file():
            self._leave_out(path, LINK_TO_NOTHING if path.is_symlink() else NO_FILE)
        elif (kind := format_of(path)) is None:
            self._leave_out(path, f"unknown ending {path.suffix}" if path.suffix else "no ending")
        elif (why := why_no_data(inside) or self._no_documents(path, kind, others_fields=False)) is not None:
            self._leave_out(path, why)
        elif (before := self._by.get(os.path.realpath(path))) is not None and before[0] == name:
            self._leave_out(path, f"the same file as {before[1]}")
        else:
            self._take(name, path, kind)

    def _leave_out(self, path: Path, why: str) -> None:
        if why == LINK_TO_NOTHING and format_of(path) is not None:
            self.problems.append(Problem(str(path), None, "is a link to nothing; restore the file or remove the link."))
        self.found.left_out.append(LeftOut(path, why))

    def _take(self, name: str, path: Path, kind: tuple[FileFormat, Compression]) -> None:
        real = os.path.realpath(path)
        if real in self._by:
            fix = "is named twice, so its documents would be used twice; remove one of the two."
            self.problems.append(Problem(str(path), None, fix))
            return
        self._by[real] = name, path
        self.found.files.append(InputFile(path, *kind, path.stat().st_size))

    def _no_documents(self, path: Path, kind: tuple[FileFormat, Compression], *, others_fields: bool) -> str | None:
        """Why a file has no documents, as far as its first bytes tell; None if it may have some.

        Args:
            path: of the file.
            kind: what its name says.
            others_fields: whether records without the field of the text pass, which reading them will refuse.
        """
        size = path.stat().st_size
        if size == 0:
            return "is empty"
        if not may_be_one_value(path):
            return None
        first = _first_bytes(InputFile(path, *kind, size)).removeprefix(b"\xef\xbb\xbf").lstrip()
        if first.startswith(b"["):
            return "is one JSON array, not JSON lines; `jq -c '.[]' FILE > FILE.jsonl` makes lines of it"
        line = first.split(b"\n", 1)[0].rstrip()
        if line.endswith((b"{", b"[", b",")):
            return "is one JSON value over several lines, not JSON lines"
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            return None  # longer than what was read, or damaged, which reading it will tell
        if not others_fields and isinstance(record, dict) and self._text_field.split(".")[0] not in record:
            return f"no field {self._text_field!r} in its first record"
        return None


def _by_reason(left_out: Iterable[LeftOut]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for item in left_out:
        found.setdefault(item.why, []).append(item.path)
    return found


def _listed(path: Path, problems: list[Problem]) -> Iterator[str]:
    """The names in a list."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        problems.append(Problem(f"@{path}", None, f"the list cannot be read ({error.strerror})."))
        return
    except UnicodeDecodeError:
        problems.append(Problem(f"@{path}", None, "the list is not UTF-8 text."))
        return
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        problems.append(Problem(f"@{path}", None, "the list names nothing."))
    yield from names


def _first_bytes(file: InputFile) -> bytes:
    """The beginning of a file's content; less, or nothing, where it is damaged: reading it all will tell."""
    found = b""
    try:
        for piece in unpacked(file, lambda _: None):
            found += piece
            if len(found) >= _FIRST_BYTES:
                break
    except (DataError, OSError):
        pass
    return found[:_FIRST_BYTES]
