"""Finds NVIDIA's apex. PyPI's package of that name is another project (a Pyramid toolkit) and is ignored."""

import importlib.util


def nvidia_apex_is_here() -> bool:
    """Whether the importable ``apex`` is NVIDIA's, built with its CUDA optimizers and weight-gradient kernel."""
    extensions = ("apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda")
    try:
        return all(importlib.util.find_spec(name) is not None for name in extensions)
    except ImportError:
        return False


def foreign_apex_is_here() -> bool:
    """Whether an ``apex`` is importable that is not NVIDIA's."""
    try:
        return importlib.util.find_spec("apex") is not None and not nvidia_apex_is_here()
    except ImportError:
        return False
