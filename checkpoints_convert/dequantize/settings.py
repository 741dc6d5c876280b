"""Fields of a ``quantization_config`` that somebody else wrote: every one has a type and a range, or is a problem."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_qwen.errors import Problem

_LONGEST_LIST = 1_000_000


class Settings:
    """A JSON object whose fields are read without trust.

    Args:
        content: the object.
        where: its place, for messages.
        problems: receives what is wrong; reading continues with a value that the reader can use.
    """

    def __init__(self, content: Mapping[str, Any], where: str, problems: list[Problem]) -> None:
        self._content, self._where, self.problems = content, where, problems

    def choice[Value: (str, int, bool)](
        self, name: str, allowed: Sequence[Value], *, default: Value | None = None
    ) -> Value:
        """A field that must have one of few values; text is compared without regard to case.

        Args:
            name: of the field.
            allowed: what it may be; the first is returned where it is something else.
            default: what its absence means; None: it is required.
        """
        value = self._content.get(name)
        if value is None and default is not None:
            return default
        for one in allowed:
            alike = isinstance(value, str) and isinstance(one, str) and value.lower() == one.lower()
            if type(value) is type(one) and (alike or value == one):
                found: Value = one
                return found
        shown = " or ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in allowed)
        self.wrong(name, value, f"is not supported; must be {shown}.")
        return allowed[0]

    def whole(self, name: str, *, low: int, high: int, also: Sequence[int] = (), default: int | None = None) -> int:
        """A whole number from ``low`` to ``high``, or one of ``also``; ``default`` where the field is absent."""
        value = self._content.get(name)
        if value is None and default is not None:
            return default
        fits = isinstance(value, int) and not isinstance(value, bool)
        if fits and isinstance(value, int) and (low <= value <= high or value in also):
            return value
        extra = "".join(f", or {one}" for one in also)
        self.wrong(name, value, f"must be a whole number from {low:,} to {high:,}{extra}.")
        return low

    def names(self, name: str) -> list[str]:
        """A list of text; empty where the field is absent."""
        value = self._content.get(name)
        if value is None:
            return []
        if isinstance(value, list) and len(value) <= _LONGEST_LIST and all(isinstance(one, str) for one in value):
            return value
        self.wrong(name, value, "must be a list of names.")
        return []

    def section(self, name: str, *, required: bool = True) -> "Settings | None":
        """An object inside the object; None where there is none."""
        value = self._content.get(name)
        if isinstance(value, dict):
            return Settings(value, f"{self._where}.{name}", self.problems)
        if required or value is not None:
            self.wrong(name, value, "must be a JSON object.")
        return None

    def get(self, name: str) -> Any:
        """Whatever a field holds; None where it is absent."""
        return self._content.get(name)

    def wrong(self, name: str, value: object, fix: str) -> None:
        """Notes a problem of a field."""
        self.problems.append(Problem(f"{self._where}.{name}", value, fix))
