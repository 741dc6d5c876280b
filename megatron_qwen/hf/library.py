"""The module of transformers, imported so that threads may do it at the same time."""

import importlib
from typing import Any


def transformers() -> Any:
    """transformers, whole.

    It puts another module in its place when its import ends. ``import transformers`` in a thread that waits for another
    one's import gives the first, which has none of its classes (CPython 3.12 and 3.13); importlib looks again.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module("transformers")
