"""What a conversation is, whatever form it was published in."""

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them.

    Args:
        messages: role, content, tool_calls and whatever else the template reads.
        tools: that the assistant may call, as JSON schemas; empty for none.
        untrained: places of the assistant's messages that carry no loss.
        hundredths: places of those whose loss counts in part, each with its weight in hundredths.
    """

    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()
    hundredths: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a record is no conversation to train on.

    Args:
        reason: the kind of mistake, for counts.
        fix: the place in the record, and what to do.
    """

    reason: str
    fix: str
