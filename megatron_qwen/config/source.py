"""From a recipe or a run.yaml and overrides to a RunConfig: strict, with every mistake reported at once."""

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from megatron_qwen.config import checks
from megatron_qwen.config.fields import Form
from megatron_qwen.config.run import SECTION_TYPES, RunConfig, all_fields
from megatron_qwen.config.strict_yaml import UNREADABLE, read_mapping, read_scalar
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.errors import ConfigError, Problem, did_you_mean


def _override(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


# A word of a command line in a file.
Override = Annotated[str, Form("section.field=value", _override)]
Recipes = Mapping[str, Callable[[], RunConfig]]
# A file: a recipe's name, and of every section some fields.
_RunFile = make_dataclass(
    "_RunFile",
    [("recipe", str | None, None), *((name, dict[str, Any], field(default_factory=dict)) for name in SECTION_TYPES)],
)


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


def resolve(source: str, overrides: Sequence[str], recipes: Recipes) -> RunConfig:
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
    changes, more = _read(over)
    base, own = _base(source, recipes)
    problems += more + own
    if base is None:
        raise ConfigError(problems)
    config = _changed(base, changes)
    if problems:
        # What else is wrong with the rest is said in the same breath.
        raise ConfigError(problems + checks.problems(config))
    return config


def _base(source: str, recipes: Recipes) -> tuple[RunConfig | None, list[Problem]]:
    """What overrides are laid over, and what is wrong with it; None where nothing can be made of it."""
    if source in recipes:
        return recipes[source](), []
    if not source.endswith((".yaml", ".yml")) and not Path(source).is_file():
        fix = f"no such recipe or run.yaml.{did_you_mean(source, recipes)} `mq recipes` lists them."
        return None, [Problem("recipe", source, fix)]
    reader = YamlReader(source)
    try:
        sections = reader.read_fields(_RunFile, read_mapping(Path(source)))
    except ConfigError as error:
        return None, list(error.problems)
    name = sections.pop("recipe", None)
    values = {f"{section}.{name}": value for section, body in sections.items() for name, value in body.items()}
    changes, problems = _read(values)
    if name in recipes:
        return _changed(recipes[name](), changes), reader.problems + problems
    if name not in (None, "custom"):
        reader.wrong("recipe", name, f"no such recipe.{did_you_mean(name, recipes)} `mq recipes` lists them.")
        return None, reader.problems + problems
    # Without a recipe the file gives every field of the model that has no default.
    shape = changes.pop("model", {})
    needed = {path: info for path, info in all_fields().items() if info.section == "model" and info.default is MISSING}
    fix = f"must be given in {source}, or name a recipe there."
    problems += [Problem(path, None, fix) for path in needed if path not in values]
    if any(info.name not in shape for info in needed.values()):
        return None, reader.problems + problems
    config = RunConfig(recipe="custom", model=SECTION_TYPES["model"](**shape))
    return _changed(config, changes), reader.problems + problems


def _read(values: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Values by path as fields by section, each of its type, and what is wrong with the others."""
    known, reader = all_fields(), YamlReader()
    changes: dict[str, dict[str, Any]] = {}
    for path, raw in values.items():
        if path not in known:
            reader.problems.append(unknown_field(path))
            continue
        info = known[path]
        value = reader.value(info.type, _as_yaml(raw, info.type), path)
        if value is not MISSING:
            changes.setdefault(info.section, {})[info.name] = value
    return changes, reader.problems


def _as_yaml(value: Any, kind: Any) -> Any:
    """What YAML would have read; a field that takes any text takes what was typed as it stands."""
    if not isinstance(value, Typed):
        return value
    takes_text = kind is str or (get_origin(kind) in (Union, types.UnionType) and str in get_args(kind))
    if takes_text and value.text not in ("", "null", "~"):
        return value.text
    try:
        return read_scalar(value.text)
    except UNREADABLE:
        return value.text


def _changed(config: RunConfig, changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    for section, values in changes.items():
        config = config.with_section(section, **values)
    return config
