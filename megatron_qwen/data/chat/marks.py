"""Marks in texts that a chat template takes and gives: what was typed is told from what the template writes.

Control tokens that a message spells are marked before it is rendered, so that the unmarked ones of the rendered text
are the template's own. Marks are characters that Unicode keeps for programs; conversations that hold them are refused
(``checks.py``).
"""

import re
from collections.abc import Iterable
from typing import Any

BEGIN_ANSWER, END_ANSWER, AS_TEXT = "\ufdd1", "\ufdd2", "\ufdd3"
_NEVER = "(?!)"


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of some names, of several at a place the longest."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or _NEVER)


def marked(value: Any, names: re.Pattern[str]) -> Any:
    """A text, or whatever of JSON holds texts, with a mark in every name that it spells."""
    if isinstance(value, str):
        return names.sub(lambda found: f"{found[0][0]}{AS_TEXT}{found[0][1:]}", value)
    if isinstance(value, dict):
        return {marked(name, names): marked(one, names) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [marked(one, names) for one in value]
    return value


def without(text: str) -> str:
    """A text without marks."""
    return text.replace(AS_TEXT, "") if AS_TEXT in text else text
