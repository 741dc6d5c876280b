"""Fields that have moved: configurations that name their earlier place are read with the same result."""

from collections.abc import Mapping
from typing import Any

# Earlier path -> present path, both ``section.field``.
MOVED = {"model.rotary_base": "rope.base"}


def with_moved_fields(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as an earlier version wrote it, with every moved field at its present place.

    For what a program wrote; ``source.py`` reads what people write, and reports a field that is given at both places.

    Args:
        sections: fields by section, as in run.yaml. Anything else in it stays; so does a value at the present place.
    """
    found = {name: dict(body) if isinstance(body, dict) else body for name, body in sections.items()}
    for earlier, present in MOVED.items():
        (section, name), (new_section, new_name) = earlier.split("."), present.split(".")
        body = found.get(section)
        target = found.setdefault(new_section, {})
        if isinstance(body, dict) and isinstance(target, dict) and name in body:
            target.setdefault(new_name, body.pop(name))
    return found
