"""Input files of a program's command line; what of them is not read is told on stderr."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_qwen.data.text.inputs import Inputs


def told_inputs(names: Sequence[str], *, text_field: str | Sequence[str]) -> "Inputs":
    """The input files for the names that were typed.

    Args:
        names: files, folders, patterns or lists.
        text_field: of JSON lines, or several of which a record has one.

    Raises:
        DataError: with every name that stands for nothing that can be read.
    """
    from megatron_qwen.data.text.inputs import find_inputs

    found = find_inputs(names, text_field=text_field)
    if found.left_out:
        print(found, file=sys.stderr)
    return found
