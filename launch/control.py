"""``mq launch cancel`` and ``requeue``: a person's hand on runs."""

import signal
from collections.abc import Sequence
from pathlib import Path

from launch import run_jobs
from launch.request import SubmitRequest, make
from launch.submit import hand_over
from megatron_qwen import slurm
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.rundir import RunDirectory, RunState


def cancel(runs: Sequence[RunDirectory]) -> list[str]:
    """Ends the jobs of runs; they save first, as at any stop.

    Returns:
        A line a run.
    """
    queue = _queue(runs)
    lines = []
    for run in runs:
        jobs = run_jobs.active(run, queue)
        if not jobs:
            lines.append(f"{run.path.name}: has no pending or running job")
            continue
        newest = run_jobs.submissions(run)[-1]
        if newest.elsewhere is not None:  # its process number is another's here
            lines.append(f"{run.path.name}: runs on {newest.elsewhere}; cancel it there")
            continue
        if newest.scheduler == "local":
            for job in jobs:
                run_jobs.tell_local(job, signal.SIGTERM)
        else:
            # The controller reads this when it is told to end: the job is not to be requeued.
            run.write_status(RunState.CANCELLED, reason="cancelled by hand", jobs=jobs)
            slurm.ask("scancel", *jobs)
        lines.append(f"{run.path.name}: cancelled job {', '.join(jobs)}")
    return lines


def requeue(runs: Sequence[RunDirectory]) -> list[str]:
    """Has runs go on: releases held jobs, requeues running ones, submits again where none is left.

    Returns:
        A line a run.

    Raises:
        ConfigError: a run was never submitted, or is done.
    """
    problems = [
        Problem("RUN", run.path, "was never submitted; submit it with `mq launch submit`.")
        for run in runs
        if not run_jobs.submissions(run)
    ]
    problems += [Problem("RUN", run.path, "is done.") for run in runs if run.state() is RunState.DONE]
    if problems:
        raise ConfigError(problems)
    queue = _queue(runs)
    return [_requeue(run, queue) for run in runs]


def _requeue(run: RunDirectory, queue: dict[str, slurm.QueuedJob]) -> str:
    newest = run_jobs.submissions(run)[-1]
    jobs = run_jobs.active(run, queue)
    held = [job for job in jobs if job in queue and queue[job].is_held]
    if held:
        slurm.ask("scontrol", "release", *held)
        return f"{run.path.name}: released job {', '.join(held)}"
    if jobs and newest.scheduler == "slurm":
        running = [job for job in jobs if queue[job].state == "RUNNING"]
        if not running:
            return f"{run.path.name}: job {', '.join(jobs)} waits already ({queue[jobs[0]].reason})"
        if newest.chain is not None:
            return f"{run.path.name}: is a chain of jobs that cannot requeue; cancel it, then requeue it"
        for job in running:
            slurm.ask("scontrol", "requeue", job)
        return f"{run.path.name}: requeued job {', '.join(running)}; it saves first"
    if jobs:
        return f"{run.path.name}: runs on this machine as process {', '.join(jobs)}"
    jobs = hand_over(_request_of(run, newest), run, forgive=True)
    return f"{run.path.name}: submitted again as job {', '.join(jobs)}"


def _request_of(run: RunDirectory, newest: run_jobs.Submission) -> SubmitRequest:
    """The request that the run's newest submission was made from."""
    return make(
        str(run.run_yaml),
        [],
        nodes=newest.nodes,
        cluster=newest.cluster,
        name=run.path.name,
        run_dir=Path(run.path),
        time_limit=newest.time_limit,
        ranks_per_node=newest.ranks_per_node,
        chain=newest.chain,
    )


def _queue(runs: Sequence[RunDirectory]) -> dict[str, slurm.QueuedJob]:
    """Slurm's jobs, where any of the runs has one."""
    needed = any(found[-1].scheduler == "slurm" for run in runs if (found := run_jobs.submissions(run)))
    return slurm.queue() if needed else {}
