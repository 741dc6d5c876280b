"""Transformer Engine and apex, where they are installed and there is no GPU, look as if they were not installed.

Replaces: their entries in ``sys.modules``, by None; an import then raises ModuleNotFoundError.
Needed: with every megatron-core so far (0.19.2 too), which takes its optimizer, its clipping and its layers from them
    wherever they import. On a login node or a laptop with a GPU image they import, and fail at the first kernel.
When: before megatron.core is imported, on processes without a GPU.
Can go: when megatron-core asks for a device as well as for the package.
"""

import sys

_NAMES = ("transformer_engine", "apex.optimizers", "apex.multi_tensor_apply")


def apply() -> None:
    """Hides the libraries that have not been imported yet."""
    for name in _NAMES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # what Python itself puts there to block an import
