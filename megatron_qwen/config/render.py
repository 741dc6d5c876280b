"""Renders a configuration: as YAML, as a difference to another, and the reference page of all fields."""

from dataclasses import MISSING
from typing import Any

import yaml

from megatron_qwen.config.fields import field_infos, type_name
from megatron_qwen.config.moved import MOVED
from megatron_qwen.config.run import SECTION_TYPES, RunConfig, as_dict


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, every field spelled out; ``resolve`` reads it back unchanged."""
    return dump(as_dict(config))


def dump(content: dict[str, Any]) -> str:
    """YAML with keys in the order given."""
    return yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)


def difference(config: RunConfig, base: RunConfig) -> dict[str, dict[str, Any]]:
    """Fields of ``config`` that differ from ``base``, as {section: {field: value}}."""
    ours, theirs = as_dict(config), as_dict(base)
    changed = {
        section: {name: value for name, value in ours[section].items() if value != theirs[section][name]}
        for section in SECTION_TYPES
    }
    return {section: body for section, body in changed.items() if body}


def reference_page() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from the dataclasses in `megatron_qwen/config/`; a test keeps it so:",
        "`./mq config reference > docs/configuration.md`.",
        "",
        "A run is a recipe (`mq recipes`) or a `run.yaml`, followed by overrides `section.field=value` or",
        "`--section.field value`. A `run.yaml` holds the sections below and may name a `recipe` to start from. Unknown",
        "fields and wrong values are reported all at once, with exit code 2.",
        "",
        "Earlier names are still read: " + ", ".join(f"`{old}` is `{new}`" for old, new in MOVED.items()) + ".",
    ]
    for section, cls in SECTION_TYPES.items():
        lines += [
            "",
            f"## {section}",
            "",
            (cls.__doc__ or "").strip(),
            "",
            "| field | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for info in field_infos(section, cls).values():
            default = "required" if info.default is MISSING else f"`{_shown(info.default)}`"
            lines.append(f"| `{info.path}` | {type_name(info.type)} | {default} | {info.doc} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
