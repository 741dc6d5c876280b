"""Without a GPU an installed Transformer Engine does not import."""

import importlib
import sys
import tempfile
from pathlib import Path

from tests.core_patches.observe import outcome


def observe(prepared: bool) -> str:
    """What an import of it gives where it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "transformer_engine.py").write_text("")
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            return outcome(lambda: importlib.import_module("transformer_engine").__name__)
        finally:
            sys.path.remove(folder)
            if not prepared:
                sys.modules.pop("transformer_engine", None)


def test_it_looks_as_if_it_were_not_there(observed):
    assert observed.plain == "transformer_engine"
    assert observed.prepared == "ModuleNotFoundError"
