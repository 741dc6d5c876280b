"""Finds the input files: names, folders, patterns and lists of them. What is not read is told, with the reason."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from megatron_qwen.data.text.filters import lookup
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

_MISSING = object()
_LONGEST_FIRST_LINE = 64 << 20  # what is longer passes, and reading it will tell
_NAMED = 5
_SHOWN = 80  # characters of a name that cannot be one


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


def find_inputs(names: Sequence[str | Path], *, text_field: str | Sequence[str] = "text") -> Inputs:
    """The input files.

    Args:
        names: a file; a folder (every file of a known format below it, sorted by name, links followed); a pattern with
            ``*``, ``?`` or ``[`` (``**`` matches folders), sorted; or ``@list``, a file with one of these on every
            line.
        text_field: field of the text in JSON lines, or several of which a record has one. A ``.json`` file below a
            folder whose first record lacks it is about the data, such as a ``dataset_info.json``.

    Raises:
        DataError: with every name that is missing, empty, unreadable or of an unknown format.
    """
    search = _Search((text_field,) if isinstance(text_field, str) else tuple(text_field))
    for name in map(str, names):
        search.add(name)
    if search.problems:
        raise DataError(search.problems)
    return search.found


class _Search:
    def __init__(self, text_fields: tuple[str, ...]) -> None:
        self.found, self.problems = Inputs(), list[Problem]()
        self._text_fields = text_fields
        self._left_out: set[Path] = set()
        self._by: dict[str, tuple[str, Path]] = {}  # of a file's real path: the name that it was found by, its own name

    def add(self, name: str, *, in_list: str | None = None) -> None:
        """Finds what one name stands for."""
        try:
            self._add(name, in_list=in_list)
        except (OSError, ValueError) as error:  # too long for a name, or with a NUL in it
            why = error.strerror if isinstance(error, OSError) else error
            shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
            self.problems.append(Problem(shown, None, f"cannot be the name of a file ({why})."))

    def _add(self, name: str, *, in_list: str | None) -> None:
        path = Path(name)
        if name.startswith("@"):
            if in_list is not None:
                self.problems.append(Problem(in_list, name, "a list cannot name another list."))
                return
            for line in _listed(Path(name[1:]), self.problems):
                self.add(line, in_list=name)
        elif path.is_dir():
            self._several(
                name, lambda: files_below(path, self._leave_out), f"contains no file that can be read: {KNOWN_ENDINGS}"
            )
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

    def _several(self, name: str, find: Callable[[], Iterable[Path]], none: str) -> None:
        """Files below a folder, or that a pattern matches."""
        files, left_out, problems = len(self.found.files), len(self.found.left_out), len(self.problems)
        try:
            for path in find():
                self._consider(name, path)
        except OSError as error:
            self.problems.append(Problem(str(error.filename or name), None, f"cannot be read ({error.strerror})."))
            return
        if len(self.found.files) == files and len(self.problems) == problems:
            there = Inputs(left_out=self.found.left_out[left_out:])
            told = f"; {'; '.join(str(there).splitlines())}" if there.left_out else ""
            self.problems.append(Problem(name, None, f"{none}{told}."))

    def _matching(self, pattern: str) -> Iterator[Path]:
        met: set[Path] = set()  # of data/**/*, files are matched, and lie in folders that are
        for match in matches(pattern):
            for path in files_below(match, self._leave_out) if match.is_dir() else [match]:
                if path not in met:
                    met.add(path)
                    yield path

    def _consider(self, name: str, path: Path) -> None:
        if not path.is_file():
            self._leave_out(path, LINK_TO_NOTHING if path.is_symlink() else NO_FILE)
        elif (kind := format_of(path)) is None:
            self._leave_out(path, f"unknown ending {path.suffix}" if path.suffix else "no ending")
        elif (why := why_no_data(path) or self._no_documents(path, kind, others_fields=False)) is not None:
            self._leave_out(path, why)
        elif (before := self._by.get(os.path.realpath(path))) is not None and before[0] == name:
            self._leave_out(path, f"the same file as {before[1]}")
        else:
            self._take(name, path, kind)

    def _leave_out(self, path: Path, why: str) -> None:
        if path in self._left_out:  # of a pattern whose matches lie in one another
            return
        self._left_out.add(path)
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
        first, whole = _first_line(InputFile(path, *kind, size))
        if first.startswith(b"["):
            return "is one JSON array, not JSON lines; `jq -c '.[]' FILE > FILE.jsonl` makes lines of it"
        if not whole:
            return None  # a very long line, or damaged, which reading it will tell
        if first.endswith((b"{", b"[", b",")):
            return "is one JSON value over several lines, not JSON lines"
        try:
            record = orjson.loads(first)
        except orjson.JSONDecodeError:
            return None
        if not others_fields and all(lookup(record, name, _MISSING) is _MISSING for name in self._text_fields):
            return f"no field {' or '.join(map(repr, self._text_fields))} in its first record"
        return None


def _by_reason(left_out: Iterable[LeftOut]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for item in left_out:
        found.setdefault(item.why, []).append(item.path)
    return found


def _listed(path: Path, problems: list[Problem]) -> Iterator[str]:
    """The names in a list."""
    if (kind := format_of(path)) is not None and kind[0] is not FileFormat.TXT:
        fix = f"is a file of documents, not a list of files; without the @ it is read: {path}"
        problems.append(Problem(f"@{path}", None, fix))
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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


def _first_line(file: InputFile) -> tuple[bytes, bool]:
    """The first line of a file's content that is not blank, and whether it is whole; damage ends it."""
    found = bytearray()
    try:
        for piece in unpacked(file, lambda _: None):
            found += piece if found else piece.removeprefix(b"\xef\xbb\xbf").lstrip()
            if (end := found.find(b"\n", len(found) - len(piece) if len(found) > len(piece) else 0)) >= 0:
                return bytes(found[:end]).rstrip(), True
            if len(found) > _LONGEST_FIRST_LINE:
                return bytes(found), False
    except (DataError, OSError):
        return bytes(found), False
    return bytes(found).rstrip(), True
