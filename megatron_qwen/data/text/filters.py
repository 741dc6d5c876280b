"""Selects records by their other fields: ``lang=en``, ``score>=0.5``."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_qwen.errors import ConfigError, Problem

_FORM = re.compile(r"(?P<field>[\w.\-]+)\s*(?P<sign>!=|>=|<=|=|>|<)\s*(?P<value>.*)", re.DOTALL)
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Condition:
    """A comparison of one field; a record without the field does not match.

    Args:
        field: its name; ``a.b`` is field b of the object a.
        sign: ``=``, ``!=``, ``>=``, ``<=``, ``>`` or ``<``.
        value: what it is compared with, as typed.
    """

    field: str
    sign: str
    value: str

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether a record meets it: numbers as numbers, anything else as text."""
        found = lookup(record, self.field)
        if found is None:
            return False
        if self.sign in _ORDER:
            if isinstance(found, bool) or not isinstance(found, int | float | Decimal):
                return False
            return _ORDER[self.sign](found, float(self.value))
        if isinstance(found, bool):
            same = str(found).lower() == self.value.lower()
        elif isinstance(found, int | float | Decimal):
            same = _number(self.value) == found
        else:
            same = str(found) == self.value
        return same is (self.sign == "=")


def lookup(record: Any, field: str, missing: Any = None) -> Any:
    """The value of a field; ``a.b`` is ``b`` inside ``a`` unless there is a field of that very name.

    Args:
        record: a record.
        field: its name.
        missing: what stands for a field that is not there.
    """
    if isinstance(record, dict) and field in record:
        return record[field]
    for depth, part in enumerate(field.split(".")):
        if record is None and depth:
            return None  # a null has no fields, and no other value either
        if not isinstance(record, dict) or part not in record:
            return missing
        record = record[part]
    return record


def parse_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Conditions as typed after ``--where``.

    Raises:
        ConfigError: with every text that is not a comparison.
    """
    problems, found = [], []
    for text in texts:
        match = _FORM.fullmatch(text)
        if match is None:
            problems.append(Problem("--where", text, "is not a comparison; write, for example, lang=en or score>=0.5."))
            continue
        condition = Condition(**match.groupdict())
        if condition.sign in _ORDER and _number(condition.value) is None:
            problems.append(
                Problem("--where", text, f"{condition.value!r} is not a number; <, <=, > and >= compare numbers.")
            )
        found.append(condition)
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
