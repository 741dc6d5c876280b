"""Everything that can be known to be wrong before a job is submitted, all at once, each with a way out. No torch."""

import json
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.cluster_limits import cluster_limits
from launch.estimates import RunPrediction, predict
from launch.finding import Finding, error, warning
from launch.local_checkpoints import local_findings
from launch.optional_packages import is_there, optional_packages
from launch.request import SubmitRequest
from launch.text import control_character
from megatron_qwen.checkpoint.paths import MANIFEST, RUN_YAML, STATE, committed
from megatron_qwen.config import checks
from megatron_qwen.config.blend import SINGLE
from megatron_qwen.config.run import SECTION_TYPES, as_dict
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import EXIT_CONFIG, EXIT_DATA, DataError, Problem, UserError
from megatron_qwen.estimate.save_interval import advise, seconds_between_faults
from megatron_qwen.optim.schedule_change import schedule_changes
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.secret_text import is_secret_name, secret_in

# What a parallel file system takes from one node, for the time a save needs.
_ASSUMED_WRITE_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Args:
        findings: in the order of the checks.
        prediction: None where the configuration is not legal.
        data_digest: hash of the token file, where its manifest has one.
    """

    findings: tuple[Finding, ...]
    prediction: RunPrediction | None
    data_digest: str | None

    @property
    def errors(self) -> list[Finding]:
        """Findings that forbid to submit."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def exit_code(self) -> int:
        """3 where only data is at fault, 2 for everything else, 0 without an error."""
        kinds = {finding.kind for finding in self.errors}
        return 0 if not kinds else EXIT_DATA if kinds == {"data"} else EXIT_CONFIG


def check(request: SubmitRequest, *, on_site: bool) -> Preflight:
    """Runs every check.

    Args:
        request: what is to be submitted.
        on_site: whether this machine is one of the cluster's, which can be asked about limits and disk.
    """
    findings = [error(problem) for problem in checks.problems(request.config, world_size=request.world_size)]
    legal = not findings
    for rule in (_texts, _secrets, _alerts, _run_directory, optional_packages, _tasks, _schedule):
        findings += rule(request)
    found, digest = _data(request)
    findings += found
    prediction = None
    broken = request.config.data.blend is not None and any(one.severity == "error" for one in found)
    if legal and not broken:
        prediction = predict(request)
        for sized in (_memory, _intervals, local_findings):
            findings += sized(request, prediction)
        findings += _disk(request, prediction) if on_site else []
    if on_site and request.cluster.scheduler == "slurm":
        findings += cluster_limits(request)
    return Preflight(tuple(findings), prediction, digest)


def _config_texts(request: SubmitRequest) -> Iterator[tuple[str, str]]:
    content = as_dict(request.config)
    for section in SECTION_TYPES:
        for name, value in content[section].items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    yield f"{section}.{name}", text


def _texts(request: SubmitRequest) -> Iterator[Finding]:
    """Nothing that could end a line of a script; nothing that Slurm would read as a pattern."""
    for where, text in (*_config_texts(request), ("--run-dir", str(request.run_dir))):
        if (character := control_character(text)) is not None:
            yield error(Problem(where, None, f"holds the control character {character}; remove it."))
    if "%" in str(request.run_dir):
        yield error(Problem("--run-dir", request.run_dir, "must not hold %, which Slurm replaces in file names."))


def _secrets(request: SubmitRequest) -> Iterator[Finding]:
    fix = "would be written into files of the run; pass it through the environment (pass_environment of the cluster)."
    for where, text in (*_config_texts(request), *request.cluster.texts()):
        if (what := secret_in(text, request.environ)) is not None:
            yield error(Problem(where, None, f"holds {what}, which {fix}"))
    for name in (*request.cluster.environment, *request.cluster.sbatch):
        if is_secret_name(name):
            yield error(Problem(f"cluster: {name}", None, f"is named like a secret, which {fix}"))


def _alerts(request: SubmitRequest) -> Iterator[Finding]:
    """What a job tells must have somewhere to go."""
    variable = request.cluster.alert_webhook_variable
    if variable is not None and not request.environ.get(variable):
        fix = "is not set in this shell, so no event of the run will be posted; set it, or remove the field."
        yield warning(Problem("cluster: alert_webhook_variable", variable, fix))


def _run_directory(request: SubmitRequest) -> Iterator[Finding]:
    """Nobody else may be able to write what the job will read and run."""
    path = request.run_dir
    if path.exists():
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            yield error(Problem("--run-dir", path, "is not a directory; choose another name."))
        elif found.st_uid != os.getuid():
            yield error(Problem("--run-dir", path, "belongs to another user; choose another name."))
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            fix = f"is writable by others, who could make the job run their code; chmod 700 {shlex.quote(str(path))}."
            yield error(Problem("--run-dir", path, fix))
    for parent in path.parents:
        if parent.is_dir():
            mode, owner = parent.stat().st_mode, parent.stat().st_uid
            if (mode & stat.S_IWGRP and not mode & stat.S_ISVTX) or owner not in (0, os.getuid()):
                fix = "lets others replace the run directory; use a directory of your own (chmod g-w)."
                yield warning(Problem("directory", parent, fix))
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                fix = "is writable by everyone, who could replace the run in it; chmod o-w, or set its sticky bit."
                yield error(Problem("directory", parent, fix))
    existing = next(parent for parent in path.parents if parent.is_dir())
    if not os.access(existing, os.W_OK):
        yield error(Problem("--run-dir", path, f"cannot be created: {existing} is not writable."))


def _data(request: SubmitRequest) -> tuple[list[Finding], str | None]:
    """Data, tokenizer and epochs."""
    config = request.config
    if config.data.path is None and config.data.blend is None:
        fix = "must be set before submission: the prefix of a .bin / .idx pair (mq data prepare)."
        return [Finding("unset", Problem("data.path", None, fix), "data")], None
    from megatron_qwen.data.reading.preflight import require_usable
    from megatron_qwen.data.reading.reading_plan import plan, warnings

    try:
        data = require_usable(config, world_size=request.world_size)
        if config.data.blend is not None:
            from launch.ledger import require_continues

            require_continues(data, RunDirectory(request.run_dir))
    except DataError as failure:
        return [Finding("error", problem, "data") for problem in failure.problems], None
    except UserError as failure:
        return [error(problem) for problem in failure.problems], None
    digest = data.sources[SINGLE].tokens.digest if config.data.blend is None else None
    return [warning(problem) for problem in warnings(data, plan(data))], digest


def _tasks(request: SubmitRequest) -> Iterator[Finding]:
    """Tasks that there are not. Their data is for the job's node to have."""
    settings = request.config.evaluation
    if not settings.tasks or not is_there("lm_eval"):
        return
    from megatron_qwen.evaluation.tasks import FIELDS, find_tasks

    directories = [] if settings.task_dir is None else [Path(settings.task_dir)]
    try:
        find_tasks(settings.tasks, directories, where=FIELDS)
    except UserError as failure:
        yield from (error(problem) for problem in failure.problems)


def _schedule(request: SubmitRequest) -> Iterator[Finding]:
    """What a changed length, batch or schedule does to a run that resumes, or that branches from another."""
    newest = _resumes_from(request)
    if newest is None:
        return
    try:
        before = resolve(str(newest / RUN_YAML), [], RECIPES)
        progress = json.loads((newest / STATE).read_text())["progress"]
        steps, consumed = int(progress["schedule_iteration"]), int(progress["consumed_samples"])
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return  # an older version's, or damaged, which the run itself finds out
    for change in schedule_changes(before, request.config, steps=steps, consumed=consumed):
        yield warning(Problem("schedule", None, change))


def _resumes_from(request: SubmitRequest) -> Path | None:
    """The checkpoint whose schedule the run continues, chosen as ``training.resume`` does, without torch."""
    if done := committed(RunDirectory(request.run_dir).checkpoints):
        return done[0][1]
    if request.config.checkpoint.branch_from is None:
        return None
    path = Path(request.config.checkpoint.branch_from)
    if (path / MANIFEST).is_file():
        return path
    return next((found[0][1] for root in (path / "checkpoints", path) if (found := committed(root))), None)


def _memory(request: SubmitRequest, prediction: RunPrediction) -> Iterator[Finding]:
    capacity = prediction.device_gib
    if capacity is None:
        return
    memory = prediction.memory
    fix = (
        f"{{}} of {capacity:.0f} GiB on a rank of pipeline stage {memory.stage}; use more tensor or pipeline "
        "parallelism, more nodes, recompute (training.recompute_granularity=full), or a smaller micro batch."
    )
    if memory.state_gib > capacity:
        what = f"weights, gradients and optimizer alone take {memory.state_gib:.1f}"
        yield error(Problem("memory", None, fix.format(what)))
    elif memory.total_gib > capacity:
        yield warning(Problem("memory", None, fix.format(f"an estimated {memory.total_gib:.1f}")))


def _disk(request: SubmitRequest, prediction: RunPrediction) -> Iterator[Finding]:
    config = request.config
    existing = next(parent for parent in (request.run_dir, *request.run_dir.parents) if parent.is_dir())
    kept = config.checkpoint.keep_last + 1  # the one that is being written
    if config.checkpoint.keep_every:
        kept += config.training.train_iters // config.checkpoint.keep_every
    there = len(committed(RunDirectory(request.run_dir).checkpoints))
    needed, free = max(1, kept - there) * prediction.checkpoint, shutil.disk_usage(existing).free
    if needed > free:
        fix = (
            f"{free / 1e9:,.1f} GB are free there and {kept} checkpoints of {prediction.checkpoint / 1e9:,.1f} GB "
            "would not fit; lower checkpoint.keep_last, or use another run root."
        )
        severity: Literal["error", "warning"] = "error" if 2 * prediction.checkpoint > free else "warning"
        yield Finding(severity, Problem("disk", existing, fix), "configuration")


def _intervals(request: SubmitRequest, prediction: RunPrediction) -> Iterator[Finding]:
    """Saves often enough for the time limit, and a warning early enough for a save."""
    cluster, config = request.cluster, request.config
    speed = prediction.speed
    if speed is None or cluster.scheduler == "local":
        return
    limit_s = cluster.time_limit_minutes * 60
    save_s = prediction.checkpoint / (_ASSUMED_WRITE_BYTES_PER_S * request.nodes)
    leave_s = speed.step_s + save_s
    if leave_s > cluster.signal_delay_s:
        fix = (
            f"is too short: a step takes about {speed.step_s:.0f} s and a save {save_s:.0f} s (at 1 GB/s a node), and "
            f"both must finish before the time limit; use at least {leave_s * 1.5:.0f}."
        )
        yield warning(Problem("signal_delay_s", cluster.signal_delay_s, fix))
    interval = config.checkpoint.save_interval
    if interval is None:  # the run chooses it
        return
    if interval == 0 or interval * speed.step_s > limit_s:
        fix = (
            f"means no save within a job of {cluster.time_limit}: a step takes about {speed.step_s:.1f} s, so a job "
            f"makes {limit_s / speed.step_s:,.0f} iterations. A fault would lose all of them; save more often."
        )
        yield warning(Problem("checkpoint.save_interval", interval, fix))
    elif cluster.mean_hours_between_faults is not None:
        faults_s = seconds_between_faults(nodes=request.nodes, hours_of_a_node=cluster.mean_hours_between_faults)
        best = advise(None, cost_s=max(save_s, 1.0), step_s=speed.step_s, fault_s=faults_s).best
        if not best / 3 <= interval <= best * 3:
            fix = (
                f"with a fault every {faults_s / 3600:.1f} h about {best} loses the least time (Young and Daly); null "
                "has the run choose it."
            )
            yield warning(Problem("checkpoint.save_interval", interval, fix))
