"""Reads a table of trained models as others write it: other separators, headers in any case, columns of other names."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_qwen.errors import ConfigError, DataError, Problem

_SEPARATORS = ",;\t|"
_SHOWN_PROBLEMS = 20


def column_names(words: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    """Names of a file's columns by the names that they have here, from ``loss=val_loss`` and the like.

    Args:
        words: as typed; a comma may stand between several.
        known: the names here.

    Raises:
        ConfigError: with every word that is none, and every name that is given twice.
    """
    found: dict[str, str] = {}
    problems = []
    for word in (part.strip() for text in words for part in text.split(",")):
        left, sign, there = (part.strip() for part in word.partition("="))
        here = left.lower()
        if not sign or not there or here not in known:
            fix = f"must be NAME=COLUMN with a NAME of {', '.join(known)}."
            problems.append(Problem("--columns", word, fix))
        elif here in found:
            fix = f"gives {here} a second time, after {here}={found[here]}; keep one."
            problems.append(Problem("--columns", word, fix))
        elif there in found.values():
            fix = f"uses the column {there} a second time; a column can be one thing only."
            problems.append(Problem("--columns", word, fix))
        else:
            found[here] = there
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
        ConfigError: ``columns`` names a column that the file does not have.
        DataError: it is no table, lacks a column, or has lines with more cells than its header.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(str(path), None, f"cannot be read as text ({error}).")) from None
    first = next((line for line in lines if line.strip()), "")
    separator = max(_SEPARATORS, key=first.count)
    reader = csv.reader(lines, delimiter=separator)
    try:
        header, *rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)] or [(1, [])]
    except csv.Error as error:
        raise DataError(Problem(f"{path}:{reader.line_num}", None, f"is not a line of a CSV ({error}).")) from None
    names = _names(path, [name.strip() for name in header[1]], known, columns)
    if missing := [name for name in needed if name not in names]:
        fix = (
            f"lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; the first line names them, and "
            "--columns loss=COLUMN says which is meant."
        )
        raise DataError(Problem(str(path), ",".join(header[1]) or None, fix))
    _require_no_more_cells(path, rows, _used(header[1]))
    return [
        (number, {name: cell.strip() for name, cell in zip(names, row, strict=False) if name is not None})
        for number, row in rows
    ]


def _require_no_more_cells(path: Path, rows: Sequence[tuple[int, Sequence[str]]], columns: int) -> None:
    """Refuses lines that do not fit the header: cells would be taken for those of other columns."""
    problems = []
    for number, row in rows:
        if (used := _used(row)) > columns:
            fix = (
                f"are more than the {columns} of the header. Write decimals with a point, not a comma, and put cells "
                "that hold a separator in quotation marks."
            )
            problems.append(Problem(f"{path}:{number}", f"{used} cells", fix))
    if rest := problems[_SHOWN_PROBLEMS:]:
        problems = [*problems[:_SHOWN_PROBLEMS], Problem(str(path), None, f"and {len(rest)} more lines like these.")]
    if problems:
        raise DataError(problems)


def _used(row: Sequence[str]) -> int:
    """Cells of a line up to the last that is not empty."""
    return max((place for place, cell in enumerate(row, start=1) if cell.strip()), default=0)


def _names(path: Path, header: Sequence[str], known: Sequence[str], columns: Mapping[str, str]) -> list[str | None]:
    """For each column its name here; None for one that is not used."""
    given = _given(path, header, columns)
    names: list[str | None] = []
    for there in header:
        own = there.lower() if there.lower() in known and there.lower() not in columns else None
        names.append(given.get(there, own))
    twice = sorted({name for name in names if name is not None and names.count(name) > 1})
    if twice:
        raise DataError(Problem(str(path), ", ".join(twice), "is the name of two columns; keep one."))
    return names


def _given(path: Path, header: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Names here of the columns that were typed, by the file's spelling; case counts only where it decides."""
    found: dict[str, str] = {}
    problems = []
    for here, there in columns.items():
        alike = [name for name in dict.fromkeys(header) if name.lower() == there.lower()]
        spelled = there if there in alike else alike[0] if len(alike) == 1 else None
        if spelled is None:
            fix = f"is not a column of {path}; it has {', '.join(header)}."
            if alike:
                fix = f"may be {' or '.join(alike)} of {path}; write it as the file does."
            problems.append(Problem("--columns", there, fix))
        elif spelled in found:
            fix = f"is already {found[spelled]}, and cannot be {here} too."
            problems.append(Problem("--columns", there, fix))
        else:
            found[spelled] = here
    if problems:
        raise ConfigError(problems)
    return found
