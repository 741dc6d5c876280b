"""What lies below a folder, and what a pattern matches. Links are followed, each place is entered once."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

NO_FILE, LINK_TO_NOTHING = "no regular file", "link to nothing"


def files_below(folder: Path, on_left_out: Callable[[Path, str], None]) -> list[Path]:
    """Every file below a folder, sorted by name.

    Args:
        folder: where to begin.
        on_left_out: called with what is no file, or was met before, and the reason.

    Raises:
        OSError: a folder cannot be read.
    """
    entered = {os.path.realpath(folder)}
    found: list[Path] = []
    for directory, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        for name in sorted(folders):
            path = Path(directory, name)
            if (real := os.path.realpath(path)) in entered:
                folders.remove(name)
                on_left_out(path, "link to a folder that is read as well")
            entered.add(real)
        for path in (Path(directory, name) for name in names):
            if path.is_file():
                found.append(path)
            else:
                on_left_out(path, LINK_TO_NOTHING if path.is_symlink() else NO_FILE)
        folders.sort()
    return sorted(found)


def matches(pattern: str) -> Iterator[Path]:
    """The paths that a pattern matches, sorted: ``*``, ``?`` and ``[`` within a name, ``**`` for any folders.

    As in a shell, a name that begins with a dot matches only a pattern that begins with one.

    Args:
        pattern: relative or absolute.

    Raises:
        OSError: a folder cannot be read.
    """
    path = Path(pattern)
    bases = [Path(path.anchor)]
    for part in path.relative_to(path.anchor).parts:
        if part == "**":
            bases = [folder for base in bases for folder in _folders_below(base)]
        elif not glob.has_magic(part):  # also ..
            bases = [base / part for base in bases if os.path.lexists(base / part)]
        else:
            bases = [
                found
                for base in bases
                for found in sorted(base.glob(part))
                if part.startswith(".") or not found.name.startswith(".")
            ]
    yield from bases


def _folders_below(base: Path) -> Iterator[Path]:
    """A folder and all visible folders below it."""
    entered = {os.path.realpath(base)}
    for directory, folders, _ in os.walk(base, onerror=_raise, followlinks=True):
        yield Path(directory)
        for name in sorted(folders):
            if name.startswith(".") or (real := os.path.realpath(Path(directory, name))) in entered:
                folders.remove(name)
            else:
                entered.add(real)
        folders.sort()


def _raise(error: OSError) -> None:
    raise error
