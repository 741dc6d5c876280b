"""What was seen of the first failure of an attempt, as attempts.jsonl keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Sign(StrEnum):
    """How the first failure showed."""

    KILLED = "killed by a signal"
    MEMORY = "out of memory"
    HUNG = "hung"
    CONNECTION = "lost connection"
    HARDWARE = "broken hardware"
    FILES = "file system of a node"
    DOWN = "node down"
    UNHEALTHY = "health check"
    ERROR = "error"


@dataclass(frozen=True)
class FailureEvidence:
    """The first failure of an attempt.

    Args:
        sign: how it showed.
        rank: that failed first, where one can be told.
        node: where it ran.
        signal: that killed it, such as SIGKILL.
        exit_code: that it left with, where no signal killed it.
        seconds: from the start of the ranks to their end.
        ends: nodes at both ends of a lost connection, where they are known.
        found: what the counters of the nodes say, one line each: Xid, ECC, links, out-of-memory kills.
    """

    sign: Sign
    rank: int | None = None
    node: str | None = None
    signal: str | None = None
    exit_code: int | None = None
    seconds: float | None = None
    ends: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For attempts.jsonl: without what is not known."""
        known = {
            "sign": str(self.sign),
            "rank": self.rank,
            "node": self.node,
            "signal": self.signal,
            "exit_code": self.exit_code,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "ends": list(self.ends) or None,
            "found": list(self.found) or None,
        }
        return {name: value for name, value in known.items() if value is not None}

    def __str__(self) -> str:
        """One line for the log."""
        who = f"rank {self.rank} on {self.node} failed first" if self.rank is not None else self.node or ""
        how = self.signal or (f"exit code {self.exit_code}" if self.exit_code is not None else "")
        after = f"{self.seconds:.0f} s after the start of the ranks" if self.seconds is not None else ""
        between = f"between {' and '.join(self.ends)}" if self.ends else ""
        return ", ".join(part for part in (str(self.sign), who, how, between, after, *self.found) if part)


def evidence_of(content: Any) -> FailureEvidence | None:
    """What ``as_dict`` wrote; None of anything else, such as the nothing that older versions wrote."""
    if not isinstance(content, Mapping) or content.get("sign") not in set(Sign):
        return None
    rank, code, seconds = (content.get(name) for name in ("rank", "exit_code", "seconds"))
    node, signal = content.get("node"), content.get("signal")
    return FailureEvidence(
        sign=Sign(content["sign"]),
        rank=rank if isinstance(rank, int) else None,
        node=None if node is None else str(node),
        signal=None if signal is None else str(signal),
        exit_code=code if isinstance(code, int) else None,
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        ends=_texts(content.get("ends")),
        found=_texts(content.get("found")),
    )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()
