"""Errors with a message for the user, each with the exit code that scripts rely on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

EXIT_FAILURE = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_NUMERICS = 17
EXIT_REQUEUE = 75
EXIT_LOST_PEER = 76
EXIT_DO_NOT_REQUEUE = 93


@dataclass(frozen=True)
class Problem:
    """One mistake: its place, the value, and what to do about it.

    Args:
        where: a field (``parallel.tensor_model_parallel_size``) or a file (``data.jsonl:17``).
        value: the offending value, or None where there is none to show.
        fix: one sentence that says what is wrong and what to do.
    """

    where: str
    value: object
    fix: str

    def __str__(self) -> str:
        # Control characters in a value must not reach the terminal.
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(self.value))
        shown = "" if self.value is None else f" = {text if len(text) <= 120 else text[:117] + '...'}"
        return f"{self.where}{shown}: {self.fix}"


def did_you_mean(word: str, known: Iterable[str], *, instead: Mapping[str, str] | None = None) -> str:
    """`` Did you mean X?`` for the nearest known word, or nothing; the end of a problem's ``fix``.

    Args:
        word: what was typed.
        known: what may be meant.
        instead: by known word, another to suggest in its place: its present name.
    """
    import difflib  # for mistakes only; every command imports this module

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {(instead or {}).get(near[0], near[0])}?" if near else ""


class UserError(ValueError):
    """A mistake that a person can fix; printed without a traceback.

    Holds every problem found, not only the first, so that one round of fixes is enough.
    """

    exit_code = EXIT_FAILURE
    kind = "error"

    def __init__(self, problems: str | Problem | Sequence[Problem]) -> None:
        if isinstance(problems, Problem):
            problems = (problems,)
        self.problems: tuple[Problem, ...] = () if isinstance(problems, str) else tuple(problems)
        text = problems if isinstance(problems, str) else "\n".join(f"  {problem}" for problem in problems)
        super().__init__(text)

    def render(self) -> str:
        """The message for stderr: the kind of error, then a line for each problem."""
        if not self.problems:
            return f"{self.kind}: {self}"
        if len(self.problems) == 1:
            return f"{self.kind}: {self.problems[0]}"
        return f"{self.kind}, {len(self.problems)} problems:\n{self}"


class ConfigError(UserError):
    """The configuration or the command line is wrong (exit 2)."""

    exit_code = EXIT_CONFIG
    kind = "configuration error"


class DataError(UserError):
    """Text, token files or a tokenizer cannot be used (exit 3)."""

    exit_code = EXIT_DATA
    kind = "data error"


class CheckpointError(UserError):
    """There is no valid checkpoint (exit 4)."""

    exit_code = EXIT_CHECKPOINT
    kind = "checkpoint error"


class ConversionError(UserError):
    """The input of a conversion, or its output path, cannot be used (exit 3)."""

    exit_code = EXIT_DATA
    kind = "conversion error"


class DiskFullError(UserError):
    """The disk is full; what was written so far is kept, and the program can be resumed (exit 1)."""

    kind = "disk full"


class NumericsError(UserError):
    """Too many consecutive steps with a loss or gradient that is not finite (exit 17)."""

    exit_code = EXIT_NUMERICS
    kind = "numerics error"


class SilentCorruptionError(UserError):
    """Weights, optimizer state or results of a rank are not what they should be (exit 76: go back and avoid it).

    Args:
        problems: what was found.
        suspects: ranks that it points to; empty where none can be named.
    """

    exit_code = EXIT_LOST_PEER
    kind = "silent corruption"

    def __init__(self, problems: str | Problem | Sequence[Problem], *, suspects: Sequence[int] = ()) -> None:
        super().__init__(problems)
        self.suspects = tuple(suspects)
