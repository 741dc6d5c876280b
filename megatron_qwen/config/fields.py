"""How a configuration field is declared: its default, its meaning and its bounds in one place.

The text given here is what ``docs/configuration.md`` prints.
"""

import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_qwen.errors import Problem


@dataclass(frozen=True)
class Bounds:
    """Inclusive limits of a number; ``above`` is exclusive."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    def complaint(self, value: float) -> str | None:
        """What is wrong with ``value``, or None."""
        if self.above is not None and not value > self.above:
            return f"must be greater than {self.above:g}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum:g}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum:g}"
        return None


def setting(
    default: Any = MISSING,
    *,
    doc: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """Declares one configuration field.

    Args:
        default: the value when nothing is said; left out, the field must be given.
        doc: one or two sentences for the reference page.
        minimum: least allowed number.
        maximum: greatest allowed number.
        above: the number must be greater than this.
    """
    return field(default=default, metadata={"doc": doc, "bounds": Bounds(minimum, maximum, above)})


@dataclass(frozen=True)
class FieldInfo:
    """What the loader, the checks and the reference page need to know of a field."""

    section: str
    name: str
    type: Any
    default: Any
    doc: str
    bounds: Bounds

    @property
    def path(self) -> str:
        """The name used in overrides, ``section.field``."""
        return f"{self.section}.{self.name}"


def field_infos(section: str, cls: type) -> dict[str, FieldInfo]:
    """The fields of one section class by name."""
    hints = get_type_hints(cls)

    def info(item: Field[Any]) -> FieldInfo:
        metadata = item.metadata
        return FieldInfo(section, item.name, hints[item.name], item.default, metadata["doc"], metadata["bounds"])

    return {item.name: info(item) for item in fields(cls)}


def type_name(kind: Any) -> str:
    """A type as the reference page and the messages write it: ``int or null``, ``one of te, torch``."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(kind) if part is not type(None)]
        return f"{type_name(inner[0])} or null" if len(inner) < len(get_args(kind)) else str(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is tuple:
        return f"list of {type_name(get_args(kind)[0])}"
    return "true or false" if kind is bool else str(kind.__name__)


def accepts_text(kind: Any) -> bool:
    """Whether a field of this type takes any text."""
    return kind is str or (get_origin(kind) in (Union, types.UnionType) and str in get_args(kind))


class WrongType(ValueError):
    """A value does not have the type of its field."""


def coerce(value: Any, kind: Any) -> Any:
    """``value`` as the type ``kind``, or WrongType.

    Strict where YAML is lax: ``true`` is no integer and ``3.0`` is no integer; lenient only where YAML
    surprises people: ``1e-4`` (a string to YAML 1.1) is a float, and 3 is a float too.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        inner = next(part for part in get_args(kind) if part is not type(None))
        return coerce(value, inner)
    if origin is Literal:
        if value in get_args(kind) and not isinstance(value, bool):
            return value
        raise WrongType
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise WrongType
        return tuple(coerce(item, get_args(kind)[0]) for item in value)
    return _coerce_scalar(value, kind)


def _coerce_scalar(value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise WrongType from None
    if value == "":
        raise WrongType
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise WrongType
    return value


def bound_problems(section: str, values: object) -> Iterator[Problem]:
    """Every number of a section that lies outside its declared bounds."""
    for info in field_infos(section, type(values)).values():
        value = getattr(values, info.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                if number != number or number in (float("inf"), float("-inf")):
                    yield Problem(info.path, value, "must be a finite number")
                elif complaint := info.bounds.complaint(number):
                    yield Problem(info.path, value, complaint)
