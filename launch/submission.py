"""Hands jobs to Slurm, or to this machine, through submitit. The only file that knows submitit."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from launch.quarantined import EXCLUDE
from launch.request import SubmitRequest
from megatron_qwen.errors import Problem
from megatron_qwen.job.call import Job
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.slurm import SlurmError

# What a job may know of the shell it was submitted from. Everything else stays behind: a stray variable changes a run,
# and a secret would be kept in Slurm's spool.
PASSED_ON = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "SLURM_CONF", "MODULEPATH", "MODULESHOME",
    "LMOD_CMD", "LMOD_DIR", "LMOD_PKG", "LD_LIBRARY_PATH", "SLURM_CONF_SERVER", "TMPDIR",
)  # fmt: skip


def environment_of_job(request: SubmitRequest) -> dict[str, str]:
    """The variables a job begins with."""
    webhook = request.cluster.alert_webhook_variable
    wanted = (*PASSED_ON, *request.cluster.pass_environment, *([webhook] if webhook else []))
    return {name: request.environ[name] for name in wanted if name in request.environ}


def setup_lines(request: SubmitRequest) -> list[str]:
    """Shell lines before the controller: signals, variables, modules, the cluster's own lines."""
    cluster = request.cluster
    lines = ["trap '' TERM USR2  # the controller, not this shell, answers them"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(cluster.environment.items())]
    if cluster.modules:
        lines += ["type module >/dev/null 2>&1 || . /etc/profile"]
        lines += [f"module load {shlex.quote(name)}" for name in cluster.modules]
    lines += cluster.setup
    # UTF-8 as mq has it, whatever the node's locale. No comment in the line: the local executor joins lines by &&.
    lines += ["export PYTHONUTF8=1"]
    lines += [f"export PYTHONPATH={shlex.quote(str(RunDirectory(request.run_dir).code))}"]
    return lines


def slurm_parameters(
    request: SubmitRequest,
    *,
    after: Sequence[str] = (),
    at_once: int | None = None,
    exclude: Sequence[str] = (),
    tasks: Sequence[SubmitRequest] = (),
) -> dict[str, Any]:
    """submitit's parameters of a job.

    Args:
        request: what is submitted.
        after: jobs that must have ended before.
        at_once: tasks of an array that may run together.
        exclude: nodes to keep it from, in addition to those of the cluster file.
        tasks: the runs of an array, in the order of its tasks; empty for a job of one run.
    """
    cluster, ranks = request.cluster, request.ranks_per_node
    chosen = {
        name: getattr(cluster, name)
        for name in ("partition", "account", "qos", "constraint")
        if getattr(cluster, name) is not None
    }
    further: dict[str, Any] = {
        ("requeue" if request.chain is None else "no-requeue"): True,
        # Without this a job ends with the first of its nodes; with it Slurm takes the node out of the job.
        **({"no-kill": True} if request.spares else {}),
        **({"reservation": cluster.reservation} if cluster.reservation else {}),
        **_memory(cluster, ranks),
        # Slurm fails a job for good if it cannot open its output, on a full disk for example: the script opens it.
        "output": "/dev/null",
        **{name: True if value == "true" else value for name, value in cluster.sbatch.items()},
    }
    if exclude:
        own = [further.pop(name) for name in EXCLUDE if name in further]
        further["exclude"] = ",".join([*own, *exclude])
    if cluster.gpus_per_node:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        chosen["gres"] = f"gpu:{kind}{cluster.gpus_per_node}"
    if cluster.exclusive:
        chosen["exclusive"] = True
    if cluster.cpus_per_rank is not None:
        chosen["cpus_per_task"] = cluster.cpus_per_rank
    if after:
        chosen["dependency"] = f"afterany:{':'.join(after)}"
    if at_once is not None:
        chosen["array_parallelism"] = at_once
    return {
        **chosen,
        "job_name": request.name,
        "nodes": request.job_nodes,
        "ntasks_per_node": ranks,
        "time": cluster.time_limit_minutes,
        "signal_delay_s": cluster.signal_delay_s,
        "setup": [
            *([] if "output" in cluster.sbatch else [_own_output(RunDirectory(request.run_dir).submission)]),
            *setup_lines(request),
            *([] if request.chain else [_rescue()]),
            *(
                _without_pickles(RunDirectory(request.run_dir).submission, tasks)
                if tasks
                else [_without_pickle(request)]
            ),
        ],
        "additional_parameters": further,
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,
    }


def _own_output(folder: Path) -> str:
    """A line after which the script writes to the file that submitit names, if that can be written."""
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    log = f"{shlex.quote(str(folder))}/{job}_0_log.out"
    return f"{{ : >>{log}; }} 2>/dev/null && exec >>{log} 2>&1"


def _rescue() -> str:
    """A line that requeues the job if the controller, the last line of the script, ends without a decision.

    The second way is for a file system that is gone together with the program that would ask Slurm. It has no limit but
    Slurm's count of starts, and no pause but Slurm's own.
    """
    job = '"${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"'
    first = f"{_python()} -m megatron_qwen.job.rescue $code"
    second = f"{{ job={job}; [ ${{SLURM_RESTART_COUNT:-0}} -gt 100 ] || scontrol requeue ${{job:-$SLURM_JOB_ID}}; }}"
    return f"trap 'code=$?; case $code in 0|2|93|130|143) ;; *) {first} || {second} ;; esac; exit $code' EXIT"


def _without_pickle(request: SubmitRequest) -> str:
    """A line that starts the controller itself where the job's pickle is missing.

    submitit names the pickle after the job when sbatch has answered. A submission that was killed in between leaves a
    job without one, which would wait for it and fail at every start.
    """
    pickle = f"{shlex.quote(str(RunDirectory(request.run_dir).submission))}/${{SLURM_JOB_ID}}_submitted.pkl"
    return f"[ -e {pickle} ] || sleep 10; [ -e {pickle} ] || {{ {_start(request)}; exit $?; }}"


def _without_pickles(folder: Path, tasks: Sequence[SubmitRequest]) -> Iterator[str]:
    """The same for an array: a line for each task, which starts its own run with that run's copy of the code."""
    pickle = f"{shlex.quote(str(folder))}/${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_submitted.pkl"
    yield f"[ -e {pickle} ] || sleep 10"
    yield f"[ -e {pickle} ] || case $SLURM_ARRAY_TASK_ID in"
    for index, request in enumerate(tasks):
        code = shlex.quote(str(RunDirectory(request.run_dir).code))
        yield f"{index}) PYTHONPATH={code} {_start(request)}; exit $? ;;"
    yield "esac"


def _start(request: SubmitRequest) -> str:
    return f"{_python()} -u -m megatron_qwen.job.call {shlex.quote(str(request.run_dir))} {request.world_size}"


def _memory(cluster: Cluster, ranks: int) -> dict[str, str]:
    """Memory of a node, as sbatch takes it; submitit's own parameter is a number of GB and cannot say "all"."""
    if cluster.memory_per_rank_gib is not None:
        return {"mem": f"{round(cluster.memory_per_rank_gib * ranks * 1024)}M"}
    return {"mem": "0"} if cluster.exclusive else {}


def script(request: SubmitRequest, *, exclude: Sequence[str] = ()) -> str:
    """The text that sbatch would get, with nodes to keep the job from."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = RunDirectory(request.run_dir).submission
    command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return str(_make_sbatch_string(command=command, folder=folder, **slurm_parameters(request, exclude=exclude)))


def submit(request: SubmitRequest, *, after: Sequence[str] = (), exclude: Sequence[str] = ()) -> str:
    """Submits one job and returns its id.

    Args:
        request: what is submitted.
        after: jobs that must have ended before.
        exclude: nodes to keep it from.

    Raises:
        SlurmError: sbatch refused.
    """
    return _submit(request, [request], RunDirectory(request.run_dir).submission, after=after, exclude=exclude)[0]


def submit_array(
    requests: Sequence[SubmitRequest],
    folder: Path,
    *,
    at_once: int,
    name: str,
    after: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Submits runs as one array and returns the ids of its tasks, in order.

    Args:
        requests: runs that differ in name, directory and configuration only.
        folder: where scripts, pickles and the controllers' logs go.
        at_once: tasks that may run together.
        name: of the array.
        after: jobs that must have ended before.
        exclude: nodes to keep it from.
    """
    named = replace(requests[0], name=name)
    return _submit(named, requests, folder, after=after, at_once=at_once, exclude=exclude)


def _submit(
    request: SubmitRequest,
    runs: Sequence[SubmitRequest],
    folder: Path,
    *,
    after: Sequence[str] = (),
    at_once: int | None = None,
    exclude: Sequence[str] = (),
) -> list[str]:
    from submitit import LocalExecutor, SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    local = request.cluster.scheduler == "local"
    with _only(environment_of_job(request)):
        if local:
            executor: Any = LocalExecutor(folder, python=_python())
            executor.update_parameters(
                timeout_min=request.cluster.time_limit_minutes,
                signal_delay_s=request.cluster.signal_delay_s,
                gpus_per_node=request.cluster.gpus_per_node,
                stderr_to_stdout=True,
                setup=[*_detached(folder), *_all_gpus(request), *setup_lines(request)[1:]],
            )
        else:
            executor = SlurmExecutor(folder, python=_python())
            # One run is a job without an array, also where several could have been meant.
            tasks = runs if len(runs) > 1 else ()
            parameters = slurm_parameters(request, after=after, at_once=at_once, exclude=exclude, tasks=tasks)
            executor.update_parameters(**parameters)
        jobs = [Job(str(run.run_dir), run.world_size) for run in runs]
        try:
            if len(jobs) == 1:
                return [str(executor.submit(jobs[0]).job_id)]
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
            return [str(job.job_id) for job in submitted]
        except (FailedJobError, FailedSubmissionError) as error:
            lines = [line for line in str(error).splitlines() if "error" in line.lower()] or str(error).splitlines()
            raise SlurmError(Problem("sbatch", None, "; ".join(line.strip() for line in lines[:3]))) from None


def _detached(folder: Path) -> list[str]:
    """Lines by which a job on this machine leaves the terminal: its Ctrl-C, its end, and the pipes of who reads us."""
    return ["trap '' INT HUP", f"exec </dev/null >>{shlex.quote(str(folder / 'local.out'))} 2>&1"]


def _all_gpus(request: SubmitRequest) -> list[str]:
    """submitit hides the GPUs of a job that names no number of them; here that means all there are."""
    return [] if request.cluster.gpus_per_node else ["unset CUDA_VISIBLE_DEVICES"]


def _python() -> str:
    """-P: nothing of the directory a job happens to start in is imported."""
    return f"{shlex.quote(sys.executable)} -P"


@contextmanager
def _only(environment: Mapping[str, str]) -> Iterator[None]:
    """Runs the block with nothing else in the environment; sbatch and the local executor hand on what they have."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
