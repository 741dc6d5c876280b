"""Shared by all programs: an argument parser with examples, and the exit codes of errors."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_qwen.errors import EXIT_CONFIG, EXIT_FAILURE, UserError

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


def run_program(program: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a program and exits with its code; a UserError is printed as a message, without a traceback."""
    try:
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
