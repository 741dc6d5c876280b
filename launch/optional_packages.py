"""Packages and variables that a configuration needs beside the project's own: looked for before the job waits."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from launch.finding import Finding, error, warning
from launch.request import SubmitRequest
from megatron_qwen.config.blend import read_blend
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import Problem, UserError
from megatron_qwen.estimate.choices import impossible
from megatron_qwen.estimate.machine import Machine

_WANDB_SERVER = "https://api.wandb.ai"
# Values of WANDB_MODE that need no key; dryrun is the earlier name of offline.
_WANDB_WITHOUT_KEY = ("offline", "disabled", "dryrun")
# What a preset's field is compared on: the same GPU with every optional package, and without one of them.
_COMPLETE = Machine("te", gpu=True, libraries=frozenset({"deep_ep"}))
_WITHOUT = {
    "transformer_engine": replace(_COMPLETE, backend="torch"),
    "deep_ep": replace(_COMPLETE, libraries=frozenset()),
}


def optional_packages(request: SubmitRequest) -> Iterator[Finding]:
    """What is missing. Jobs run in this environment; what a container holds is not known here."""
    if request.cluster.container is not None:
        return
    # Without the values, which may be secrets that other checks refuse.
    for field, module, extra in _needs(request.config):
        if not is_there(module):
            way = f"pip install 'megatron_qwen[{extra}]'" if extra else "see the documents of that project"
            fix = f"needs the package {module}, which is not installed: {way}."
            yield error(Problem(field, None, fix))
    if request.config.metrics.wandb_project is not None and is_there("wandb") and not _has_key(request):
        fix = (
            "needs a key in the job, and there is none: pass WANDB_API_KEY (pass_environment of the cluster), run "
            "`wandb login`, or set WANDB_MODE=offline in environment of the cluster."
        )
        yield warning(Problem("metrics.wandb_project", None, fix))


def _needs(config: RunConfig) -> Iterator[tuple[str, str, str | None]]:
    """Field, module and the extra of this project that installs it; None where the user must build the package."""
    if config.metrics.wandb_project is not None:
        yield "metrics.wandb_project", "wandb", "wandb"
    if config.data.loader == "dali":
        yield "data.loader", "nvidia.dali", "dali"
    if config.evaluation.tasks:
        yield "evaluation.tasks", "lm_eval", "eval"
    yield from ((field, "transformer_engine", "gpu") for field in _transformer_engine_fields(config))
    yield from ((field, "deep_ep", None) for field in _lost_without("deep_ep", config))
    for field, path in _token_files(config):
        if "://" in path:
            yield field, "multistorageclient", "object-store"
            return


def _transformer_engine_fields(config: RunConfig) -> Iterator[str]:
    """Fields that a rank without Transformer Engine refuses (models/backend.py, estimate/choices.py)."""
    precision = config.precision
    if precision.backend == "torch" or precision.emulate_fp8:
        return  # what they cannot be combined with is refused as such: the package would not help
    if precision.backend == "te":
        yield "precision.backend"
    if precision.fp8 is not None:
        yield "precision.fp8"
    if precision.use_precision_aware_optimizer:
        yield "precision.use_precision_aware_optimizer"
    yield from _lost_without("transformer_engine", config)


def _lost_without(module: str, config: RunConfig) -> list[str]:
    """Fields that are possible on a complete machine, and not where a package is missing."""
    possible_nowhere = {problem.where for problem in impossible(config, _COMPLETE)}
    refused = [problem.where for problem in impossible(config, _WITHOUT[module])]
    return [where for where in refused if where not in possible_nowhere]


def _token_files(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Field and prefix of every token file; none of a blend file that cannot be read, which other checks refuse."""
    if config.data.path is not None:
        yield "data.path", config.data.path
    if config.data.blend is not None:
        try:
            sources = read_blend(Path(config.data.blend)).sources
        except UserError:
            return
        yield from (("data.blend", source.path) for source in sources.values())


def is_there(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _has_key(request: SubmitRequest) -> bool:
    """Whether the job will find a key, or needs none."""
    if _in_job(request, "WANDB_API_KEY") or _in_job(request, "WANDB_MODE") in _WANDB_WITHOUT_KEY:
        return True
    # `wandb login` keeps the key by the host of the server.
    host = urlsplit(_in_job(request, "WANDB_BASE_URL") or _WANDB_SERVER).hostname
    login = Path(request.environ.get("HOME", "~")).expanduser() / ".netrc"
    try:
        return host is not None and host in login.read_text(errors="replace")
    except OSError:
        return False


def _in_job(request: SubmitRequest, name: str) -> str:
    """A variable as the job has it; empty where it is not set. Lines of the cluster file come after what is passed."""
    cluster = request.cluster
    passed = request.environ.get(name, "") if name in cluster.pass_environment else ""
    return cluster.environment.get(name, passed)
