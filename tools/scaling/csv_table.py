"""Reads a table of trained models as others write it: other separators, headers in any case, columns of other names."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_qwen.errors import ConfigError, DataError, Problem

_SEPARATORS = ",;\t|"


def column_names(words: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    """Names of a file's columns by the names that they have here, from ``loss=val_loss`` and the like.

    Args:
        words: as typed; a comma may stand between several.
        known: the names here.

    Raises:
        ConfigError: with every word that is none.
    """
    found, problems = {}, []
    for word in (part.strip() for text in words for part in text.split(",")):
        here, sign, there = word.partition("=")
        if not sign or not there.strip() or here.strip() not in known:
            fix = f"must be NAME=COLUMN with a NAME of {', '.join(known)}."
            problems.append(Problem("--columns", word, fix))
        else:
            found[here.strip()] = there.strip()
    if problems:
        raise ConfigError(problems)
    return found


def read_table(
    path: Path, *, needed: Sequence[str], known: Sequence[str], columns: Mapping[str, str]
) -> list[tuple[int, dict[str, str]]]:
    """The lines of a file as cells by name, each with the number of its line.

    Args:
        path: the file; comma, semicolon, tab or bar between cells.
        needed: columns that must be there.
        known: columns that are used; others are left alone.
        columns: the file's names of columns, where they are not those of ``known`` in any case.

    Raises:
        DataError: it is no table, or lacks a column.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(str(path), None, f"cannot be read as text ({error}).")) from None
    separator = max(_SEPARATORS, key=(lines[0] if lines else "").count)
    reader = csv.reader(lines, delimiter=separator)
    try:
        header, *rows = [(reader.line_num, row) for row in reader if row] or [(1, [])]
    except csv.Error as error:
        raise DataError(Problem(f"{path}:{reader.line_num}", None, f"is not a line of a CSV ({error}).")) from None
    names = _names(path, [name.strip() for name in header[1]], known, columns)
    if missing := [name for name in needed if name not in names]:
        fix = (
            f"lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; the first line names them, and "
            "--columns loss=COLUMN says which is meant."
        )
        raise DataError(Problem(str(path), ",".join(header[1]) or None, fix))
    return [
        (number, {name: cell.strip() for name, cell in zip(names, row, strict=False) if name is not None})
        for number, row in rows
    ]


def _names(path: Path, header: Sequence[str], known: Sequence[str], columns: Mapping[str, str]) -> list[str | None]:
    """For each column its name here; None for one that is not used."""
    if absent := [there for there in columns.values() if there not in header]:
        fix = f"is not a column of {path}; it has {', '.join(header)}."
        raise ConfigError([Problem("--columns", there, fix) for there in absent])
    given = {there: here for here, there in columns.items()}
    names: list[str | None] = []
    for there in header:
        own = there.lower() if there.lower() in known and there.lower() not in columns else None
        names.append(given.get(there, own))
    twice = sorted({name for name in names if name is not None and names.count(name) > 1})
    if twice:
        raise DataError(Problem(str(path), ", ".join(twice), "is the name of two columns; keep one."))
    return names
