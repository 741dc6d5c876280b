"""Reads a YAML mapping into a frozen dataclass by the annotations of its fields; reports all problems at once.

Annotations may be dataclasses, ``tuple``, ``list``, ``dict``, ``Mapping``, ``Literal``, unions, ``str``, ``int``,
``float``, ``bool`` and ``Any``. ``Annotated`` adds ``Bounds`` to a number, or a ``Form`` in which a value is written.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_qwen.config.fields import LISTED_FIELDS, Bounds, Form, type_name
from megatron_qwen.errors import ConfigError, Problem, did_you_mean


class YamlReader:
    """Reads values by their annotated types and collects the problems.

    Args:
        origin: name of the file, prefixed to every field in messages; empty for overrides, which have no file.
        see: sentence that says where all fields are documented, appended to the message about an unknown field.
        extra_fields: whether a mapping may have fields that its dataclass lacks.
    """

    def __init__(self, origin: str = "", *, see: str = "", extra_fields: bool = False) -> None:
        self.origin, self.see, self.extra_fields = origin, see, extra_fields
        self.problems: list[Problem] = []

    def wrong(self, field: str, value: object, fix: str) -> None:
        """Notes a problem of a field, such as ``stages[1].tokens``."""
        self.problems.append(Problem(": ".join(part for part in (self.origin, field) if part), value, fix))

    def raise_problems(self) -> None:
        """Raises ConfigError with every noted problem, or returns."""
        if self.problems:
            raise ConfigError(self.problems)

    def read[T](self, kind: type[T], content: object, field: str = "") -> T | None:
        """A dataclass from its mapping.

        Args:
            kind: the dataclass.
            content: the mapping.
            field: its place in the file.

        Returns:
            The object, also where problems were noted, so that its fields can be checked against one another: an
            optional field that is wrong has its default, a number out of bounds stays. None where a required field
            has no value.
        """
        given = self.read_fields(kind, content, field)
        required = [name for name, item in _settable(kind).items() if not _has_default(item)]
        return None if any(name not in given for name in required) else kind(**given)

    def read_fields(self, kind: type, content: object, field: str = "") -> dict[str, Any]:
        """The fields of a dataclass that are given and right, by name; a problem is noted for each of the others.

        Args:
            kind: the dataclass.
            content: the mapping.
            field: its place in the file.
        """
        if not isinstance(content, dict):
            self.wrong(field, _shown(content), f"must be {type_name(kind)}.")
            return {}
        known, hints = _settable(kind), _annotations(kind)
        for name in content:
            if name not in known and not self.extra_fields:
                self._unknown(_inside(field, name), str(name), known)
        values = {}
        for name, item in known.items():
            where = _inside(field, name)
            if name not in content:
                if not _has_default(item):
                    self.wrong(where, None, "is required.")
                continue
            if content[name] is None and _has_default(item) and _is_container(hints[name]):
                continue  # ``overrides:`` with nothing after it
            value = self.value(hints[name], content[name], where)
            if value is not MISSING:
                self._check_bounds(item.metadata.get("bounds"), value, where)
                values[name] = value
        return values

    def value(self, kind: Any, value: Any, field: str) -> Any:
        """A value as a type; MISSING, and a problem noted, where it is of another.

        Strict where Python is lax: ``true`` and ``3.0`` are not integers. Lenient where readers see no difference:
        ``3`` and ``"1e-4"`` are accepted as floats, and a number as text.

        Args:
            kind: the type, as an annotation.
            value: as YAML has read it.
            field: its place in the file.
        """
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self._annotated(arguments[0], arguments[1:], value, field)
        if origin in (Union, types.UnionType):
            return None if value is None and types.NoneType in arguments else self._any_of(kind, value, field)
        if origin in (tuple, list):
            return self._items(kind, value, field)
        if origin in (dict, Mapping):
            return self._mapping(kind, value, field)
        if is_dataclass(kind):
            found = self.read(kind, value, field)  # type: ignore[arg-type]
            return MISSING if found is None else found
        return self._by(partial(_scalar, kind), kind, value, field)

    def _by(self, read: Callable[[Any], Any], kind: Any, value: Any, field: str) -> Any:
        try:
            return read(value)
        except ValueError:
            self.wrong(field, _shown(value), f"must be {type_name(kind)}.")
            return MISSING

    def _unknown(self, where: str, name: str, known: Iterable[str]) -> None:
        hint, names = did_you_mean(name, known), list(known)
        if not hint and not self.see and len(names) <= LISTED_FIELDS:
            hint = f" Known fields: {', '.join(names)}."
        self.wrong(where, None, f"no such field.{hint}{self.see and ' ' + self.see}")

    def _annotated(self, kind: Any, extras: tuple[Any, ...], value: Any, field: str) -> Any:
        forms = [extra for extra in extras if isinstance(extra, Form)]
        if forms:
            found = self._by(forms[0].read, Annotated[kind, forms[0]], value, field)
        else:
            found = self.value(kind, value, field)
        for extra in extras:
            if isinstance(extra, Bounds):
                self._check_bounds(extra, found, field)
        return found

    def _check_bounds(self, bounds: Bounds | None, value: Any, field: str) -> None:
        for number in value if isinstance(value, tuple | list) else (value,):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and bounds is not None and (complaint := bounds.complaint(number)):
                self.wrong(field, number, f"{complaint}.")

    def _any_of(self, union: Any, value: Any, field: str) -> Any:
        """The value as the first member of a union that accepts it; else the problems of the nearest member."""
        kinds = tuple(kind for kind in get_args(union) if kind is not types.NoneType)
        if len(kinds) == 1:
            plain = get_origin(kinds[0]) in (None, Literal) and not is_dataclass(kinds[0])
            read = partial(_scalar, kinds[0])
            return self._by(read, union, value, field) if plain else self.value(kinds[0], value, field)
        trials = []
        for kind in kinds:
            trial = YamlReader(self.origin, see=self.see, extra_fields=self.extra_fields)
            found = trial.value(kind, value, field)
            if not trial.problems:
                return found
            trials.append((_nearness(kind, value), found, trial.problems))
        nearest = max(trials, key=lambda trial: trial[0])
        if nearest[0] == 0 or _is_mixed(kinds, value):
            self.wrong(field, _shown(value), f"must be {type_name(union)}.")
            return MISSING
        self.problems += nearest[2]
        return nearest[1]

    def _items(self, kind: Any, value: Any, field: str) -> Any:
        origin, arguments = get_origin(kind), get_args(kind)
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (fixed and len(value) != len(arguments)):
            self.wrong(field, _shown(value), f"must be {type_name(kind)}.")
            return MISSING
        kinds = arguments if fixed else (arguments[0],) * len(value)
        found = [
            self.value(one, item, f"{field}[{place}]")
            for place, (one, item) in enumerate(zip(kinds, value, strict=True))
        ]
        return MISSING if any(item is MISSING for item in found) else origin(found)

    def _mapping(self, kind: Any, value: Any, field: str) -> Any:
        if not isinstance(value, dict):
            self.wrong(field, _shown(value), f"must be {type_name(kind)}.")
            return MISSING
        of_key, of_item = get_args(kind)
        pairs = [
            (self.value(of_key, key, _inside(field, key)), self.value(of_item, item, _inside(field, key)))
            for key, item in value.items()
        ]
        return MISSING if any(MISSING in (key, item) for key, item in pairs) else dict(pairs)


def _inside(field: str, name: object) -> str:
    return f"{field}.{name}" if field else str(name)


@cache  # a plan of a study has a mapping for each of thousands of runs
def _annotations(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _settable(kind: Any) -> dict[str, Field[Any]]:
    return {item.name: item for item in fields(kind) if item.init}


def _has_default(item: Field[Any]) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING


def _is_container(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list, dict, Mapping) or is_dataclass(kind)


def _shown(value: object) -> object:
    """A value for a message: text in quotes, which distinguishes ``'8'`` from ``8``."""
    return "null" if value is None else repr(value) if isinstance(value, str) else value


def _scalar(kind: Any, value: Any) -> Any:
    """A scalar value of a type; raises ValueError for a value of another type."""
    if kind is Any:
        return value
    if get_origin(kind) is Literal:
        if value in get_args(kind) and not isinstance(value, bool):
            return value
        raise ValueError
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError from None
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value == "" or isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise ValueError
    return value


def _nearness(kind: Any, value: object) -> int:
    """How closely a value resembles a type that rejects it: 0 where the structure differs (list, mapping, scalar)."""
    origin = get_origin(kind)
    if is_dataclass(kind):
        return 1 + len(_settable(kind).keys() & value.keys()) if isinstance(value, dict) else 0
    if origin in (dict, Mapping):
        return int(isinstance(value, dict))
    if origin in (tuple, list):
        return int(isinstance(value, list))
    return int(not isinstance(value, dict | list))


def _is_mapping_of(kind: Any, value: dict[Any, Any]) -> bool:
    return is_dataclass(kind) and value.keys() <= _settable(kind).keys()


def _is_mixed(kinds: tuple[Any, ...], value: object) -> bool:
    """Whether a mapping mixes fields of several dataclasses of a union, so that no member is the nearest."""
    if not isinstance(value, dict) or any(_is_mapping_of(kind, value) for kind in kinds):
        return False
    known = [name for kind in kinds if is_dataclass(kind) for name in _settable(kind)]
    return bool(value) and all(name in known for name in value)
