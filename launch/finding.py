"""One thing that a check before submission found."""

from dataclasses import dataclass
from typing import Literal

from megatron_qwen.errors import Problem

Severity = Literal["error", "unset", "warning"]


@dataclass(frozen=True)
class Finding:
    """A problem and how much it matters.

    Args:
        severity: error forbids to submit; unset does too, but not to look at the plan; a warning forbids nothing.
        problem: where, what, and the way out.
        kind: data for what exit code 3 is for, else configuration.
    """

    severity: Severity
    problem: Problem
    kind: Literal["configuration", "data"] = "configuration"

    def __str__(self) -> str:
        shown = {"error": "ERROR", "unset": "to do", "warning": "warning"}[self.severity]
        return f"{shown}: {self.problem}"


def error(problem: Problem) -> Finding:
    """A finding that forbids to submit."""
    return Finding("error", problem)


def warning(problem: Problem) -> Finding:
    """A finding that forbids nothing."""
    return Finding("warning", problem)
