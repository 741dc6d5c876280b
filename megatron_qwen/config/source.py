"""From a recipe or a run.yaml and overrides to a RunConfig: strict, with every mistake reported at once."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.config import checks
from megatron_qwen.config.fields import FieldInfo, WrongType, accepts_text, coerce, type_name
from megatron_qwen.config.run import SECTION_TYPES, RunConfig, all_fields
from megatron_qwen.config.strict_yaml import UNREADABLE, read_mapping, read_scalar
from megatron_qwen.errors import ConfigError, Problem


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean X?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def unknown_field(path: str) -> Problem:
    """The problem of a field that does not exist, with the nearest one that does."""
    known = all_fields()
    section, _, name = path.partition(".")
    same_name = [candidate for candidate, info in known.items() if info.name == (name or section)]
    if same_name:
        return Problem(path, None, f"no such field. Did you mean {same_name[0]}?")
    hint = did_you_mean(path, known) or ("" if section in SECTION_TYPES else did_you_mean(section, SECTION_TYPES))
    return Problem(path, None, f"no such field.{hint or ' See docs/configuration.md for all of them.'}")


@dataclass(frozen=True)
class Typed:
    """A value as it was typed, not yet read: a text field takes it as it stands."""

    text: str


def parse_overrides(words: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """``section.field=value`` and ``--section.field value`` words to values by path.

    Values are read as YAML scalars or lists, so ``null``, ``true``, ``[16, 16, 1000]`` mean what they say.
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
            # A bare field's name is worth a guess; anything else is no override at all.
            known = {info.name for info in all_fields().values()}
            hint = unknown_field(path) if path in known else Problem(word, None, "expected section.field=value.")
            problems.append(hint)
            continue
        values[path] = Typed(text)
    return values, problems


def _typed(info: FieldInfo, value: Any, where: str) -> tuple[Any, Problem | None]:
    if isinstance(value, Typed):
        if accepts_text(info.type) and value.text not in ("", "null", "~"):
            return value.text, None
        try:
            value = read_scalar(value.text)
        except UNREADABLE:
            value = value.text
    try:
        return coerce(value, info.type), None
    except WrongType:
        shown = "null" if value is None else repr(value)
        return None, Problem(where, shown, f"must be {type_name(info.type)}.")


def _flatten(content: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], list[Problem]]:
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for section, body in content.items():
        if section == "recipe":
            continue
        if section not in SECTION_TYPES:
            problems.append(
                Problem(f"{origin}: {section}", None, f"no such section.{did_you_mean(str(section), SECTION_TYPES)}")
            )
        elif not isinstance(body, dict):
            problems.append(Problem(f"{origin}: {section}", body, "must be a mapping of fields."))
        else:
            values.update({f"{section}.{name}": value for name, value in body.items()})
    return values, problems


def apply(config: RunConfig, values: Mapping[str, Any]) -> tuple[RunConfig, list[Problem]]:
    """``config`` with values by path laid over it, and what is wrong with them."""
    known = all_fields()
    problems: list[Problem] = []
    changes: dict[str, dict[str, Any]] = {}
    for path, raw in values.items():
        if path not in known:
            problems.append(unknown_field(path))
            continue
        value, problem = _typed(known[path], raw, path)
        if problem:
            problems.append(problem)
        else:
            changes.setdefault(known[path].section, {})[known[path].name] = value
    for section, fields_ in changes.items():
        config = config.with_section(section, **fields_)
    return config, problems


def resolve(source: str, overrides: Sequence[str], recipes: Mapping[str, Callable[[], RunConfig]]) -> RunConfig:
    """The configuration that a command line names.

    Args:
        source: a recipe's name or the path of a run.yaml.
        overrides: ``section.field=value`` words.
        recipes: the functions that make a recipe, by name.

    Raises:
        ConfigError: with every unknown field and every value of a wrong type. Whether the combination is
            legal is not asked here; see ``checks.py``.
    """
    over, problems = parse_overrides(overrides)
    if source in recipes:
        base = recipes[source]()
    elif source.endswith((".yaml", ".yml")) or Path(source).is_file():
        content = read_mapping(Path(source))
        name = content.get("recipe")
        values, more = _flatten(content, source)
        problems += more
        base, more = _from_values(name, values, recipes, source)
        problems += more
    else:
        raise ConfigError(
            Problem(
                "recipe", source, f"no such recipe or run.yaml.{did_you_mean(source, recipes)} `mq recipes` lists them."
            )
        )
    config, more = apply(base, over)
    problems += more
    if problems:
        # What else is wrong with the rest is said in the same breath.
        raise ConfigError(problems + checks.problems(config))
    return config


def _from_values(
    name: Any, values: dict[str, Any], recipes: Mapping[str, Callable[[], RunConfig]], origin: str
) -> tuple[RunConfig, list[Problem]]:
    """A file names its recipe and says what differs, or gives every required field itself."""
    if isinstance(name, str) and name in recipes:
        return apply(recipes[name](), values)
    if name is not None and name != "custom":
        hint = did_you_mean(str(name), recipes)
        raise ConfigError(Problem(f"{origin}: recipe", name, f"no such recipe.{hint} `mq recipes` lists them."))
    required = [path for path, info in all_fields().items() if info.section == "model" and path not in values]
    missing = [path for path in required if all_fields()[path].default is MISSING]
    if missing:
        unknown = [unknown_field(path) for path in values if path not in all_fields()]
        raise ConfigError(
            [Problem(path, None, f"must be given in {origin}, or name a recipe there.") for path in missing] + unknown
        )
    shape: dict[str, Any] = {}
    problems: list[Problem] = []
    known = all_fields()
    for path in [path for path in values if path.startswith("model.")]:
        if path not in known:
            continue
        value, problem = _typed(known[path], values[path], path)
        shape[known[path].name] = value
        if problem:
            problems.append(problem)
    if problems:
        raise ConfigError(problems)
    base = RunConfig(recipe="custom", model=SECTION_TYPES["model"](**shape))
    return apply(base, values)
