"""Finds NVIDIA's apex. PyPI's package of that name is another project (a Pyramid toolkit) and is ignored."""

import importlib.util
from pathlib import Path

_EXTENSIONS = ("amp_C", "fused_weight_gradient_mlp_cuda")


def _apex_folders() -> list[Path]:
    """Where ``apex`` lies, found without importing it: importing the other project would run it."""
    spec = importlib.util.find_spec("apex")
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


def nvidia_apex_is_here() -> bool:
    """Whether the importable ``apex`` is NVIDIA's, built with its CUDA optimizers and weight-gradient kernel."""
    has_optimizers = any((folder / "optimizers").is_dir() for folder in _apex_folders())
    return has_optimizers and all(importlib.util.find_spec(name) is not None for name in _EXTENSIONS)


def foreign_apex_is_here() -> bool:
    """Whether an ``apex`` is importable that is not NVIDIA's."""
    return bool(_apex_folders()) and not any((folder / "optimizers").is_dir() for folder in _apex_folders())
