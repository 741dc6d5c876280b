"""A run.yaml as versions before the rope section wrote it."""

from pathlib import Path
from typing import Any

import yaml


def at_earlier_places(sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the RoPE base in the model section, and no other trace of RoPE."""
    rest = {name: body for name, body in sections.items() if name != "rope"}
    return {**rest, "model": {**rest["model"], "rotary_base": sections["rope"]["base"]}}


def rewrite(run_yaml: Path) -> None:
    """Makes a run.yaml an earlier version's."""
    content = at_earlier_places(yaml.safe_load(run_yaml.read_text()))
    run_yaml.write_text(yaml.safe_dump(content, sort_keys=False))
