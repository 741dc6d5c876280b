"""Text on its way into a script: what must not be in it."""

import unicodedata


def control_character(text: str) -> str | None:
    """The first character that could end a line or steer a terminal, as ``U+000A``; None where there is none."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs"):
            return f"U+{ord(character):04X}"
    return None
