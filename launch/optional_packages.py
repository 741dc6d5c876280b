"""Packages and variables that a configuration needs beside the project's own: looked for before the job waits."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from launch.finding import Finding, error, warning
from launch.request import SubmitRequest
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import Problem

_WANDB_HOST = "api.wandb.ai"


def optional_packages(request: SubmitRequest) -> Iterator[Finding]:
    """What is missing. Jobs run in this environment; what a container holds is not known here."""
    if request.cluster.container is not None:
        return
    # Without the values, which may be secrets that other checks refuse.
    for field, module, extra in _needs(request.config):
        if not _is_there(module):
            fix = f"needs the package {module}, which is not installed: pip install 'megatron_qwen[{extra}]'."
            yield error(Problem(field, None, fix))
    if request.config.metrics.wandb_project is not None and _is_there("wandb") and not _has_key(request):
        fix = (
            "needs a key in the job, and there is none: pass WANDB_API_KEY (pass_environment of the cluster), run "
            "`wandb login`, or set WANDB_MODE=offline in environment of the cluster."
        )
        yield warning(Problem("metrics.wandb_project", None, fix))


def _needs(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Field, module and the extra of this project that installs it."""
    if config.metrics.wandb_project is not None:
        yield "metrics.wandb_project", "wandb", "wandb"
    if config.data.loader == "dali":
        yield "data.loader", "nvidia.dali", "dali"
    if config.precision.backend == "te":
        yield "precision.backend", "transformer_engine", "gpu"
    if config.data.path is not None and "://" in config.data.path:
        yield "data.path", "multistorageclient", "object-store"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _has_key(request: SubmitRequest) -> bool:
    cluster = request.cluster
    if "WANDB_API_KEY" in cluster.pass_environment and request.environ.get("WANDB_API_KEY"):
        return True
    if {"WANDB_MODE", "WANDB_BASE_URL"} & {*cluster.environment, *cluster.pass_environment}:
        return True
    login = Path(request.environ.get("HOME", "~")).expanduser() / ".netrc"
    try:
        return _WANDB_HOST in login.read_text(errors="replace")
    except OSError:
        return False
