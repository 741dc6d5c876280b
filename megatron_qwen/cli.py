"""Shared by all programs: an argument parser with examples, and the exit codes of errors."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_qwen.errors import EXIT_CONFIG, EXIT_FAILURE, ConfigError, Problem, UserError

EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line, with exit code 2; its subparsers do the same.

    Args:
        prog: command as typed, such as ``mq train``.
        description: what the program does.
        examples: command lines shown at the end of --help.
    """

    def __init__(self, prog: str, *, description: str, examples: Sequence[str] = ()) -> None:
        epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else None
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Reports a mistake of the command line."""
        self.exit(EXIT_CONFIG, f"configuration error: {message}. See {self.prog} --help.\n")


def _require_text(arguments: Sequence[str]) -> None:
    """Raises ConfigError for words that are not UTF-8: Python has half a surrogate pair in the place of other bytes."""
    wrong = [word for word in arguments if any("\udc80" <= character <= "\udcff" for character in word)]
    if wrong:
        fix = "is not UTF-8 text; rename the file, or use a UTF-8 locale (such as LC_ALL=C.UTF-8) in this terminal."
        raise ConfigError([Problem("command line", word.encode(errors="surrogateescape"), fix) for word in wrong])


def run_program(program: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a program and exits with its code; a UserError is printed as a message, without a traceback."""
    try:
        _require_text(sys.argv[1:])
        code = program(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(error.render(), file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}.", file=sys.stderr)
        code = EXIT_FAILURE
    sys.exit(code)
