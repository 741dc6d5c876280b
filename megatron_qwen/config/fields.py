"""How a configuration field is declared: its default, its meaning and its bounds in one place.

The text given here is what ``docs/configuration.md`` prints.
"""

import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_qwen.errors import Problem

# A message lists the fields of a mapping up to this number.
LISTED_FIELDS = 15


@dataclass(frozen=True)
class Bounds:
    """Inclusive limits of a number; ``above`` and ``below`` are exclusive. ``finite=False`` allows infinity."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    finite: bool = True

    def complaint(self, value: float) -> str | None:
        """Why ``value`` is out of bounds, or None."""
        if value != value or (self.finite and value in (math.inf, -math.inf)):
            return "must be a finite number"
        if self.above is not None and not value > self.above:
            return f"must be greater than {self.above:g}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum:g}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum:g}"
        if self.below is not None and not value < self.below:
            return f"must be less than {self.below:g}"
        return None


@dataclass(frozen=True)
class Form:
    """A notation of a value that its type alone does not describe (``300B``), for ``Annotated``.

    Args:
        name: what the value must be, for messages: ``a number of tokens, such as 300B``.
        read: converts the value that YAML read; raises ValueError for anything else.
    """

    name: str
    read: Callable[[object], Any]


def setting(
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    doc: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declares one configuration field.

    Args:
        default: the default value; without one, the field is required.
        factory: makes the default where it is mutable, such as a mapping.
        doc: one or two sentences for the reference page.
        minimum: least allowed number.
        maximum: greatest allowed number.
        above: the number must be greater than this.
        below: the number must be less than this.
    """
    metadata = {"doc": doc, "bounds": Bounds(minimum, maximum, above, below)}
    return (
        field(default=default, metadata=metadata)
        if factory is None
        else field(default_factory=factory, metadata=metadata)
    )


@dataclass(frozen=True)
class FieldInfo:
    """A field as the loader, the checks and the reference page need it."""

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


@cache  # the checks ask for every layout that `mq plan` looks at, and types are strings until they are evaluated
def field_infos(section: str, cls: type) -> Mapping[str, FieldInfo]:
    """The fields of one section class by name."""
    hints = get_type_hints(cls)

    def info(item: Field[Any]) -> FieldInfo:
        metadata = item.metadata
        default = item.default if item.default_factory is MISSING else item.default_factory()
        return FieldInfo(section, item.name, hints[item.name], default, metadata["doc"], metadata["bounds"])

    return {item.name: info(item) for item in fields(cls)}


def type_name(kind: Any) -> str:
    """A type as the reference page and the messages write it: ``int or null``, ``one of te, torch``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        forms = [extra.name for extra in arguments[1:] if isinstance(extra, Form)]
        return forms[0] if forms else type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else type_name(part) for part in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        return f"list of {f'{len(arguments)} ' if fixed else ''}{type_name(arguments[0])}"
    if origin in (dict, Mapping):
        return _mapping_name(*arguments)
    if is_dataclass(kind):
        names = [item.name for item in fields(kind)]
        return f"a mapping with {', '.join(names)}" if len(names) <= LISTED_FIELDS else "a mapping of fields"
    return "true or false" if kind is bool else str(kind.__name__)


def _mapping_name(key: Any, value: Any) -> str:
    if value is Any:
        return "a mapping of fields"
    key_name, value_name = ("text" if kind is str else type_name(kind) for kind in (key, value))
    return f"mapping of {key_name} to {value_name}"


def bound_problems(section: str, values: object) -> Iterator[Problem]:
    """A problem for every number of a section outside its declared bounds."""
    cls: Any = type(values)
    for info in field_infos(section, cls).values():
        value = getattr(values, info.name)
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and (complaint := info.bounds.complaint(number)):
                yield Problem(info.path, value, complaint)
