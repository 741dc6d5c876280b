"""Resolves a recipe or a run.yaml plus overrides into a RunConfig: strict, with every mistake reported at once."""

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from megatron_qwen.config import checks
from megatron_qwen.config.fields import Form
from megatron_qwen.config.moved import MOVED
from megatron_qwen.config.run import SECTION_TYPES, RunConfig, all_fields
from megatron_qwen.config.strict_yaml import UNREADABLE, read_mapping, read_scalar
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.errors import ConfigError, Problem, did_you_mean


def _override(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


# An override as a YAML file lists it.
Override = Annotated[str, Form("section.field=value", _override)]
Recipes = Mapping[str, Callable[[], RunConfig]]


@cache  # not at import: a command that names a recipe reads no file
def _run_file() -> type:
    """The form of a run.yaml: the name of a recipe, and for each section any of its fields."""
    sections: list[Any] = [(name, dict[str, Any], field(default_factory=dict)) for name in SECTION_TYPES]
    return make_dataclass("_RunFile", [("recipe", str | None, None), *sections])


def unknown_field(path: str) -> Problem:
    """The problem that reports an unknown field, with the nearest known one."""
    known = {**{candidate: candidate for candidate in all_fields()}, **MOVED}
    section, _, name = path.partition(".")
    same_name = [present for candidate, present in known.items() if _name_of(candidate) == (name or section)]
    if same_name:
        return Problem(path, None, f"no such field. Did you mean {same_name[0]}?")
    hint = did_you_mean(path, known, instead=MOVED)
    hint = hint or ("" if section in SECTION_TYPES else did_you_mean(section, SECTION_TYPES))
    return Problem(path, None, f"no such field.{hint or ' See docs/configuration.md for all of them.'}")


def _name_of(path: str) -> str:
    return path.partition(".")[2]


class RawText(str):
    """The text of an override before parsing. A field of type str takes it verbatim, others parse it as YAML."""

    __slots__ = ()


def parse_overrides(words: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """``section.field=value`` and ``--section.field value`` words to values by path.

    Values stay text here; ``resolve`` parses them as YAML scalars or lists by the type of their field.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    words = list(words)
    while words:
        word = words.pop(0)
        path, equals, text = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--") and words:
            text, equals = words.pop(0), "="
        if not equals or "." not in path.strip("."):
            # A field's name without its section gets a suggestion; anything else is not an override.
            known = set(map(_name_of, (*all_fields(), *MOVED)))
            hint = unknown_field(path) if path in known else Problem(word, None, "expected section.field=value.")
            problems.append(hint)
            continue
        values[path] = RawText(text)
    return values, problems


def resolve(source: str, overrides: Sequence[str], recipes: Recipes) -> RunConfig:
    """The configuration that a command line asks for.

    Args:
        source: a recipe's name or the path of a run.yaml.
        overrides: ``section.field=value`` words.
        recipes: functions that build a recipe, by name.

    Raises:
        ConfigError: with every unknown field and every value of a wrong type. Whether a correctly typed combination is
            legal is checked by ``checks.py``, not here.
    """
    over, problems = parse_overrides(overrides)
    changes, more = _read(over)
    base, own = _base(source, recipes)
    problems += more + own
    if base is None:
        raise ConfigError(problems)
    config = _with_changes(base, changes)
    if problems:
        # Report illegal combinations of the readable fields together with these, so that one round of fixes is enough.
        raise ConfigError(problems + checks.problems(config))
    return config


def with_words(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """A configuration with ``section.field=value`` words changed.

    Raises:
        ConfigError: with every unknown field and every value of a wrong type.
    """
    over, problems = parse_overrides(words)
    changes, more = _read(over)
    if problems + more:
        raise ConfigError(problems + more)
    return _with_changes(config, changes)


def _base(source: str, recipes: Recipes) -> tuple[RunConfig | None, list[Problem]]:
    """The configuration that overrides apply to, and its problems; None where no configuration can be built."""
    if source in recipes:
        return recipes[source](), []
    if not source.endswith((".yaml", ".yml")) and not Path(source).is_file():
        fix = f"no such recipe or run.yaml.{did_you_mean(source, recipes)} `mq recipes` lists them."
        return None, [Problem("recipe", source, fix)]
    reader = YamlReader(source)
    try:
        sections = reader.read_fields(_run_file(), read_mapping(Path(source)))
    except ConfigError as error:
        return None, list(error.problems)
    name = sections.pop("recipe", None)
    values = {f"{section}.{name}": value for section, body in sections.items() for name, value in body.items()}
    changes, problems = _read(values)
    if name in recipes:
        return _with_changes(recipes[name](), changes), reader.problems + problems
    if name not in (None, "custom"):
        reader.wrong("recipe", name, f"no such recipe.{did_you_mean(name, recipes)} `mq recipes` lists them.")
        return None, reader.problems + problems
    # Without a recipe, the file must set every model field that has no default.
    shape = changes.pop("model", {})
    needed = {path: info for path, info in all_fields().items() if info.section == "model" and info.default is MISSING}
    fix = f"must be set in {source}, unless the file names a recipe."
    problems += [Problem(path, None, fix) for path in needed if path not in values]
    if any(info.name not in shape for info in needed.values()):
        return None, reader.problems + problems
    config = RunConfig(recipe="custom", model=SECTION_TYPES["model"](**shape))
    return _with_changes(config, changes), reader.problems + problems


def _read(values: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Typed values as {section: {field: value}}, and the problems of the values that could not be read."""
    known, reader = all_fields(), YamlReader()
    changes: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for path, raw in values.items():
        info = known.get(MOVED.get(path, path))
        if info is None:
            reader.problems.append(unknown_field(path))
            continue
        value = reader.value(info.type, _as_yaml(raw, info.type), path)
        if value is not MISSING:
            found[path] = value
            changes.setdefault(info.section, {})[info.name] = value
    for earlier, present in MOVED.items():
        if earlier in found and present in found and found[earlier] != found[present]:
            fix = f"has moved to {present}, which is given too, as {found[present]}; give {present} alone."
            reader.wrong(earlier, found[earlier], fix)
    return changes, reader.problems


def _as_yaml(value: Any, kind: Any) -> Any:
    """The value as YAML parses it; for a field of type str, the text verbatim (``1e-4`` stays text)."""
    if not isinstance(value, RawText):
        return value
    takes_text = kind is str or (get_origin(kind) in (Union, types.UnionType) and str in get_args(kind))
    if takes_text and str(value) not in ("", "null", "~"):
        return str(value)
    try:
        return read_scalar(str(value))
    except UNREADABLE:
        return str(value)


def _with_changes(config: RunConfig, changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    for section, values in changes.items():
        config = config.with_section(section, **values)
    return config
