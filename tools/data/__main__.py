"""``mq data``: which action is meant."""

import importlib
from collections.abc import Sequence

from megatron_qwen.cli import run_program
from tools.data.arguments import parser


def main(arguments: Sequence[str]) -> int:
    """Does what was asked for."""
    command_line = parser()
    options, overrides = command_line.parse_known_args(arguments)
    action = importlib.import_module(options.module)
    if getattr(options, "takes_overrides", False):
        return int(action.main(options, overrides))
    if overrides:
        command_line.error(f"unrecognized arguments: {' '.join(overrides)}")
    return int(action.main(options))


if __name__ == "__main__":
    run_program(main)
