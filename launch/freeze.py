"""Makes the run directory a job can start from: configuration, code, packages, job settings; notes submissions."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.request import SubmitRequest
from launch.snapshot import NOTE
from launch.snapshot import freeze as freeze_code
from launch.submission import setup_lines
from megatron_qwen.attempts import now
from megatron_qwen.checkpoint.paths import LORA_BASE, STATE, committed
from megatron_qwen.config.blend import read_blend
from megatron_qwen.config.render import to_yaml
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import publish
from megatron_qwen.job import environment
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.rundir import RunDirectory

_OURS = ("PYTHONPATH", "MQ_ATTEMPT", "MASTER_ADDR", "MASTER_PORT")
# What slurm/train.sbatch sources: the lines that submitit's script has.
SETUP = "job.setup.sh"
_KNOWS_SPARES = "megatron_qwen/job/node_choice.py"


def freeze(request: SubmitRequest, *, data_digest: str | None, new_code: bool) -> list[str]:
    """Writes run.yaml, code/, environment.json and job.json; what is there already and agrees stays.

    Args:
        request: what is submitted.
        data_digest: hash of the token file, where it is known.
        new_code: take the present code and packages where the run has a snapshot already.

    Returns:
        What a person should know, a line each.

    Raises:
        ConfigError: the directory belongs to another configuration.
        EnvironmentChangedError: the packages are not those of the first submission.
    """
    directory = RunDirectory(request.run_dir)
    if directory.code.exists() and not new_code:
        _require_readable(request, directory)
        if request.spares and not (directory.code / _KNOWS_SPARES).is_file():
            fix = "needs code that knows spare nodes, which the run's frozen code does not; --new-code replaces it."
            raise ConfigError(Problem("--spares", request.spares, fix))
    settings = job_settings(request)
    if directory.code.exists() and not new_code:
        environment.require_unchanged(directory.path, settings, wait=False)
    directory.claim(request.config, data_digest=data_digest)
    directory.path.chmod(0o700)
    said = _freeze_code(request, directory, new_code=new_code)
    if new_code or not (directory.path / environment.NAME).is_file():
        environment.record(directory.path, settings)
    settings.write(directory.path)
    (directory.path / SETUP).write_text("\n".join(setup_lines(request)) + "\n")
    return said


def _require_readable(request: SubmitRequest, directory: RunDirectory) -> None:
    """Raises ConfigError where the code that the run keeps does not know what the present code writes."""
    probe = directory.path / ".run.probe.yaml"
    probe.write_text(to_yaml(request.config))
    command = [sys.executable, "-P", "-m", "tools.config", "show", str(probe)]
    own = {**os.environ, "PYTHONPATH": str(directory.code)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=60, check=False)
    finally:
        probe.unlink()
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()[-1:]), f"it ends with {done.returncode}")
        fix = f"is the run's frozen code and cannot read this configuration ({said.strip()}); --new-code replaces it."
        raise ConfigError(Problem("code", directory.code, fix))


def _freeze_code(request: SubmitRequest, directory: RunDirectory, *, new_code: bool) -> list[str]:
    if directory.code.exists() and not new_code:
        return [f"code: the snapshot {_when(directory.code)} is kept; --new-code replaces it by the current code"]
    fresh = directory.path / "code.new"
    shutil.rmtree(fresh, ignore_errors=True)
    snapshot = freeze_code(fresh, environ=request.environ)
    if directory.code.exists():
        directory.code.rename(directory.path / f"code.until_{now().replace(':', '')}")
    publish(fresh, directory.code)
    said = [f"code: {_named({'commit': snapshot.commit, 'modified': snapshot.modified})}"]
    return said + [f"left out of the snapshot: {name}" for name in snapshot.left_out]


def _when(code: Path) -> str:
    try:
        note = json.loads((code / NOTE).read_text())
        return f"of {note['time']} ({_named(note)})"
    except (OSError, ValueError, KeyError):
        return "without a readable snapshot.json"


def _named(note: dict[str, Any]) -> str:
    commit = f"commit {note['commit'][:12]}" if note["commit"] else "not a git checkout"
    return commit + (" with uncommitted changes" if note["modified"] else "")


def job_settings(request: SubmitRequest) -> JobSettings:
    """What the controller is to know."""
    cluster, directory = request.cluster, RunDirectory(request.run_dir)
    mounts = [f"{path}:{path}" for path in _mounted(request)] + list(cluster.container_mounts)
    srun_arguments: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    if cluster.container == "pyxis":
        srun_arguments = (
            f"--container-image={cluster.container_image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={directory.path}",
            # An image's own variables would win over these otherwise.
            f"--container-env={','.join([*_OURS, *sorted(cluster.environment)])}",
        )
    elif cluster.container == "apptainer":
        gpu = ("--nv",) if cluster.gpus_per_node else ()
        prefix = ("apptainer", "exec", *gpu, "--bind", ",".join(mounts), str(cluster.container_image))
    health = None
    if cluster.health_check and cluster.scheduler == "slurm":
        health = ("--gpus", str(cluster.gpus_per_node), "--disk", str(directory.path), *cluster.health_check_arguments)
    return JobSettings(
        scheduler=cluster.scheduler,
        signal_delay_s=cluster.signal_delay_s,
        requeue=request.chain is None,
        python=sys.executable if cluster.container is None else cluster.container_python,
        srun_arguments=srun_arguments,
        rank_prefix=prefix,
        health_check=health,
        mean_hours_between_faults=cluster.mean_hours_between_faults,
        quarantine=str(cluster.quarantine) if cluster.scheduler == "slurm" and cluster.quarantine_hours else None,
        quarantine_hours=cluster.quarantine_hours,
        spares=request.spares,
        metrics_directory=cluster.metrics_directory,
        metrics_port=cluster.metrics_port,
        metrics_address=cluster.metrics_address,
        alert_command=cluster.alert_command,
        alert_webhook_variable=cluster.alert_webhook_variable,
        alert_on=tuple(cluster.alert_on),
    )


def _mounted(request: SubmitRequest) -> list[Path]:
    """Directories that the ranks need inside a container."""
    data, checkpoint = request.config.data, request.config.checkpoint
    wanted = [request.run_dir]
    wanted += [Path(data.path).parent] if data.path and "://" not in data.path else []
    if data.blend:
        wanted += sorted(
            {
                Path(source.path).parent
                for source in read_blend(Path(data.blend)).sources.values()
                if "://" not in source.path
            }
        )
    others = (data.tokenizer, request.config.evaluation.task_dir, checkpoint.load, checkpoint.branch_from)
    wanted += [Path(path) for path in others if path]
    wanted += [Path(path) for path in _bases(request)]
    return list(dict.fromkeys(wanted))


def _bases(request: SubmitRequest) -> Iterator[str]:
    """Places of frozen weights, where a run begins or goes on from a checkpoint of adapters."""
    named = (request.run_dir, request.config.checkpoint.load, request.config.checkpoint.branch_from)
    for place in (Path(path) for path in named if path):
        own = [place] if (place / STATE).is_file() else []
        own += [path for root in (place / "checkpoints", place) for _, path in committed(root)]
        for path in own[:1]:
            with suppress(OSError, ValueError, KeyError, TypeError):
                yield str(json.loads((path / STATE).read_text())[LORA_BASE]["path"])


def note_jobs(request: SubmitRequest, jobs: list[str], *, exclude: Sequence[str] = ()) -> None:
    """Adds a submission to jobs.jsonl.

    Args:
        request: what was submitted.
        jobs: ids.
        exclude: nodes in quarantine that Slurm was told to keep the jobs from.
    """
    entry = {**submission_of(request), "jobs": jobs, "exclude": list(exclude)}
    with RunDirectory(request.run_dir).jobs.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def submission_of(request: SubmitRequest) -> dict[str, Any]:
    """A line of jobs.jsonl, without the jobs."""
    cluster = request.cluster_name
    if cluster.endswith((".yaml", ".yml")):
        cluster = str(Path(cluster).absolute())
    return {
        "time": now(),
        "scheduler": request.cluster.scheduler,
        "cluster": cluster,
        "nodes": request.nodes,
        "spares": request.spares,
        "ranks_per_node": request.cluster.ranks_per_node,
        "time_limit": request.cluster.time_limit,
        "chain": request.chain,
        "host": os.uname().nodename,
    }


def remove_unused(path: Path, *, existed: bool) -> None:
    """Takes back a run directory that a failed submission made; one that was there before stays."""
    if not existed:
        shutil.rmtree(path, ignore_errors=True)
