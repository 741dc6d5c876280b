"""Trained models with their losses, as a CSV has them: what every fit begins with."""

import contextlib
import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from megatron_qwen.errors import DataError, Problem
from tools.scaling.csv_table import read_table

Array = NDArray[np.float64]
Chosen = NDArray[np.bool_] | NDArray[np.int_]
DONE, DIVERGED, FAILED, UNFINISHED = "done", "diverged", "failed", "unfinished"
STATUSES = (DONE, DIVERGED, FAILED, UNFINISHED)
_NEEDED = ("params", "tokens", "loss")
_NUMBERS = (*_NEEDED, "learning_rate", "batch_tokens", "embedding_params", "total_params", "granularity")
COLUMNS = (*_NUMBERS, "status", "name")
# Beyond it products of a size and its tokens overflow; far above anything that is trained.
_LARGEST = 1e30
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Observation:
    """One trained model.

    Args:
        params: N: parameters that a token meets, without embeddings unless the file says otherwise.
        tokens: D: tokens it was trained on.
        loss: final loss in nats a token; NaN where it has none.
        status: done, diverged, failed or unfinished; only done ones are fitted.
        learning_rate: the peak, where it was varied.
        batch_tokens: tokens of a step, where they were varied.
        embedding_params: of the input embedding and the output matrix.
        total_params: all parameters of an MoE model, counted as ``params`` are; None is a dense model.
        granularity: size of a dense feed-forward over that of an expert; None is a dense model.
        name: of the cell.
    """

    params: float
    tokens: float
    loss: float
    status: str = DONE
    learning_rate: float | None = None
    batch_tokens: float | None = None
    embedding_params: float | None = None
    total_params: float | None = None
    granularity: float | None = None
    name: str = ""


def read_csv(path: Path, columns: Mapping[str, str] | None = None) -> list[Observation]:
    """Reads observations; columns beyond those of ``Observation`` are left alone.

    Args:
        path: the file.
        columns: its names of columns, by the names that they have here, where they differ.

    Raises:
        DataError: with every line that cannot be used.
    """
    rows = read_table(path, needed=_NEEDED, known=COLUMNS, columns=columns or {})
    found, problems = [], []
    for number, cells in rows:
        wrong = list(_problems(f"{path}:{number}", cells))
        problems += wrong
        if not wrong:
            found.append(_observation(cells))
    if problems:
        shown, rest = problems[:_SHOWN_PROBLEMS], len(problems) - _SHOWN_PROBLEMS
        if rest > 0:
            shown = [*shown, Problem(str(path), None, f"and {rest} more lines like these.")]
        raise DataError(shown)
    if not found:
        raise DataError(Problem(str(path), None, "has no line below its header."))
    return found


def _problems(where: str, cells: dict[str, str]) -> Iterable[Problem]:
    status = cells.get("status") or DONE
    if status not in STATUSES:
        yield Problem(f"{where}: status", status, f"must be one of {', '.join(STATUSES)}.")
    for name in _NUMBERS:
        text = cells.get(name, "")
        if not text:
            if name in _NEEDED and not (name == "loss" and status != DONE):
                yield Problem(f"{where}: {name}", None, "is empty.")
            continue
        try:
            value = float("" if "_" in text else text)
        except ValueError:
            yield Problem(f"{where}: {name}", text, "is not a number.")
            continue
        if name == "loss" and status != DONE:
            continue  # whatever a run that went wrong has printed
        if not (0 < value <= _LARGEST or (name == "embedding_params" and value == 0)):
            yield Problem(f"{where}: {name}", text, f"must be a number above 0 and at most {_LARGEST:g}.")
    sizes = {name: cells.get(name, "") for name in ("params", "total_params")}
    with contextlib.suppress(ValueError):
        if float(sizes["total_params"]) < float(sizes["params"]):
            yield Problem(f"{where}: total_params", sizes["total_params"], "is less than params, which are among them.")


def _observation(cells: dict[str, str]) -> Observation:
    numbers = {name: float(cells[name]) for name in _NUMBERS if cells.get(name)}
    status = cells.get("status") or DONE
    loss = numbers.pop("loss", math.nan) if status == DONE else math.nan
    numbers.pop("loss", None)
    return Observation(loss=loss, status=status, name=cells.get("name", ""), **numbers)


def write_csv(path: Path, observations: Iterable[Observation]) -> None:
    """Writes what ``read_csv`` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        write_observations(file, observations)


def write_observations(file: TextIO, observations: Iterable[Observation]) -> None:
    """The same to an open file."""
    names = [field.name for field in fields(Observation)]
    writer = csv.writer(file)
    writer.writerow(names)
    for one in observations:
        values = (getattr(one, name) for name in names)
        writer.writerow("" if value is None or value != value else value for value in values)


def column(observations: Iterable[Observation], name: str) -> Array:
    """One field of all, NaN where it is not given."""
    values = (getattr(one, name) for one in observations)
    return np.array([math.nan if value is None else value for value in values], dtype=float)
