"""Strict YAML: scalars by the rules of YAML 1.2, no duplicate keys, no merge keys.

YAML 1.1, which PyYAML reads by default, takes ``1:30`` for 90, ``0123`` for 83, ``1e-4`` for a string and
``2020-01-01`` for a date.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_qwen.errors import ConfigError, Problem

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),  # "" is PyYAML's sign of nothing after a colon
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute, filled below)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

# What PyYAML raises for text that cannot be read: syntax, numbers beyond Python's limits, endless nesting.
UNREADABLE = (yaml.YAMLError, TypeError, ValueError, OverflowError, RecursionError)


def read_scalar(text: str) -> Any:
    """A value as typed on a command line: a scalar or a list. Raises one of ``UNREADABLE``."""
    return yaml.load(text, Loader=_Loader) if text else ""


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds something else; names file and line.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(Problem(str(path), None, f"cannot be read ({error.strerror}).")) from None
    except UnicodeDecodeError:
        raise ConfigError(Problem(str(path), None, "is not UTF-8 text.")) from None
    except UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = str(getattr(error, "problem", None) or error).splitlines()[0][:100]
        raise ConfigError(Problem(where, None, f"is not valid YAML ({reason}).")) from None
    if not isinstance(content, dict):
        raise ConfigError(Problem(str(path), None, "must contain a YAML mapping, not a list or a single value."))
    return content
