"""Documents out of text files, with every bad line named by file and number."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_qwen.errors import DataError, Problem

_SUFFIXES = (".jsonl", ".txt")


def check_files(paths: Sequence[Path]) -> None:
    """Raises DataError with every file that is missing, empty, unreadable or of an unknown kind."""
    problems = []
    for path in paths:
        if not path.is_file():
            problems.append(Problem(str(path), None, "no such file."))
        elif path.suffix not in _SUFFIXES:
            problems.append(Problem(str(path), path.suffix, f"is not one of {', '.join(_SUFFIXES)}."))
        elif path.stat().st_size == 0:
            problems.append(Problem(str(path), None, "is empty."))
    if problems:
        raise DataError(problems)


def documents(paths: Sequence[Path], *, field: str = "text") -> Iterator[str]:
    """The documents of files: a line's field in .jsonl, the whole file in .txt.

    Args:
        paths: files, read in this order.
        field: name of the text in a JSON line.

    Raises:
        DataError: a line is no JSON object with that field as text, or a file is not UTF-8.
    """
    for path in paths:
        try:
            if path.suffix == ".txt":
                yield path.read_text(encoding="utf-8-sig")
            else:
                yield from _json_lines(path, field)
        except UnicodeDecodeError as error:
            raise DataError(Problem(str(path), f"byte {error.start}", "is not UTF-8 text; convert the file.")) from None
        except OSError as error:
            raise DataError(Problem(str(path), None, f"cannot be read ({error.strerror}).")) from None


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(Problem(f"{path}:{number}", line[:60].strip(), "is no JSON.")) from None
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(
                    Problem(f"{path}:{number}", line[:60].strip(), f"has no text in the field {field!r}; see --field.")
                )
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                fix = "its text holds half a surrogate pair, which is no character; mend or drop the line."
                raise DataError(Problem(f"{path}:{number}", None, fix))
            yield text
