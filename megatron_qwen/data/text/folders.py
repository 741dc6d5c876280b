"""What lies below a folder, and what a pattern matches. Links are followed, each place is entered once."""

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

NO_FILE, LINK_TO_NOTHING, HIDDEN = "no regular file", "link to nothing", "hidden"

OnLeftOut = Callable[[Path, str], None]


def files_below(folder: Path, on_left_out: OnLeftOut) -> list[Path]:
    """Every visible file below a folder, sorted by name.

    Args:
        folder: where to begin.
        on_left_out: called with what is hidden, is no file, or was met before, and the reason.

    Raises:
        OSError: a folder cannot be read.
    """
    found: list[Path] = []
    for directory, names in _visible_folders(folder, on_left_out):
        for path in (directory / name for name in names):
            if path.name.startswith("."):
                on_left_out(path, HIDDEN)
            elif path.is_file():
                found.append(path)
            else:
                on_left_out(path, LINK_TO_NOTHING if path.is_symlink() else NO_FILE)
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
            bases = [base / name for base in bases if base.is_dir() for name in _matching(base, part)]
    yield from bases


def _matching(base: Path, part: str) -> Iterator[str]:
    """The names in a folder that a part of a pattern matches."""
    for name in sorted(path.name for path in base.iterdir()):
        if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
            yield name


def _folders_below(base: Path) -> list[Path]:
    """A folder and all visible folders below it, each before those in it."""
    return sorted(directory for directory, _ in _visible_folders(base, lambda *_: None)) if base.is_dir() else []


def _visible_folders(folder: Path, on_left_out: OnLeftOut) -> Iterator[tuple[Path, list[str]]]:
    """A folder and the visible ones below it, each with the names of what is no folder in it.

    Links to folders are followed after all that lies there itself, so that a link to a folder that is met anyway is the
    one that is left out. Hidden folders come last, and are only told: a visible link may lead into one.
    """
    waiting, entered, hidden = deque([folder]), set[str](), list[Path]()
    while waiting:
        for current, folders, names in os.walk(waiting.popleft(), onerror=_raise):
            directory = Path(current)
            if (real := os.path.realpath(directory)) in entered:
                folders.clear()
                on_left_out(directory, "link to a folder that is read as well")
                continue
            entered.add(real)
            hidden += [directory / name for name in folders if name.startswith(".")]
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for path in (directory / name for name in folders) if path.is_symlink()]
            yield directory, names
    for top in hidden:
        _tell_hidden(top, on_left_out)


def _tell_hidden(top: Path, on_left_out: OnLeftOut) -> None:
    if top.is_symlink():
        on_left_out(top, HIDDEN)
        return
    # What cannot be entered is not read either, so it is no error.
    for current, _, names in os.walk(top, onerror=lambda _: on_left_out(top, HIDDEN)):
        for name in sorted(names):
            on_left_out(Path(current, name), HIDDEN)


def _raise(error: OSError) -> None:
    raise error
