"""``mq launch cancel`` and ``requeue``: a person's hand on runs."""

import contextlib
import os
import pwd
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launch import by_hand, orphans, run_jobs
from launch.freeze import freeze
from launch.request import SubmitRequest, make
from launch.submit import alone, hand_over
from megatron_qwen import slurm
from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.files import atomic_write
from megatron_qwen.job.environment import require_unchanged
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.rundir import RunDirectory, RunState


def cancel(runs: Sequence[RunDirectory]) -> Iterator[str]:
    """Ends the jobs of runs; they save first, as at any stop.

    Yields:
        A line a run, when it is done.
    """
    for run in runs:
        orphans.settle(run)
    queue = run_jobs.known(runs)
    for run in runs:
        jobs = run_jobs.active(run, queue)
        if not jobs and orphans.is_being_submitted(run):
            yield f"{run.path.name}: is being submitted by another command; cancel it when that has ended"
            continue
        if not jobs:
            yield f"{run.path.name}: has no pending or running job"
            continue
        newest = run_jobs.submissions(run)[-1]
        if newest.elsewhere is not None:  # its process number is another's here
            yield f"{run.path.name}: runs on {newest.elsewhere}; cancel it there"
            continue
        if newest.scheduler == "local":
            for job in jobs:
                run_jobs.tell_local(job, signal.SIGTERM)
        else:
            _end(run, jobs)
        yield f"{run.path.name}: cancelled job {', '.join(jobs)}"


def _end(run: RunDirectory, jobs: Sequence[str]) -> None:
    before = run.status.read_text() if run.status.is_file() else None
    # The controller reads this when it is told to end: the job is not to be requeued.
    with contextlib.suppress(OSError):  # a full disk; the controller asks Slurm as well
        run.write_status(RunState.CANCELLED, reason="cancelled by hand", jobs=list(jobs))
    try:
        slurm.ask("scancel", *jobs)
    except UserError:  # it runs on, and is requeued as ever
        with contextlib.suppress(OSError):  # another user's run, or a full disk
            if before is not None:
                atomic_write(run.status, before)
        raise


def requeue(runs: Sequence[RunDirectory], *, new_code: bool = False) -> Iterator[str]:
    """Resumes runs: releases held jobs, requeues running ones, submits again where none is left.

    Args:
        runs: which.
        new_code: whether they take the present code and packages, in place of those of their submission.

    Yields:
        A line a run, when it is done.

    Raises:
        ConfigError: a run was never submitted, or is done.
        EnvironmentChangedError: the packages are not those of a run's submission.
    """
    for run in runs:
        orphans.settle(run)
    problems = [
        Problem("RUN", run.path, "was never submitted; submit it with `mq launch submit`.")
        for run in runs
        if not run_jobs.submissions(run)
    ]
    problems += [Problem("RUN", run.path, "is done.") for run in runs if run.state() is RunState.DONE]
    if problems:
        raise ConfigError(problems)
    queue = run_jobs.known(runs)
    for run in runs:
        yield _requeue(run, queue, new_code=new_code)


def _requeue(run: RunDirectory, queue: dict[str, slurm.QueuedJob], *, new_code: bool) -> str:
    newest = run_jobs.submissions(run)[-1]
    jobs = run_jobs.active(run, queue)
    if new_code and (there := [*jobs, *run_jobs.ending(run, queue)]):
        fix = f"has job {', '.join(there)}, which uses the code; cancel it, and give --new-code when it has ended."
        raise ConfigError(Problem("RUN", run.path, fix))
    if any(map(run.is_cancelled, jobs)):  # of a job that is there all the same
        run.write_status(RunState.QUEUED)
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
    if (owner := run.path.stat().st_uid) != os.getuid():
        fix = f"belongs to {_name_of(owner)}, and a new job would be yours: it could not write there. Run this as them."
        raise ConfigError(Problem("RUN", run.path, fix))
    with alone(run.path):
        queue = run_jobs.known([run])  # another command may have submitted it since
        if jobs := run_jobs.active(run, queue):
            return f"{run.path.name}: job {', '.join(jobs)} waits or runs already"
        by_hand.require_nobody(run)
        before = run_jobs.ending(run, queue)
        request = _request_of(run, newest)
        if new_code:
            freeze(request, data_digest=None, new_code=True)
        else:
            require_unchanged(run.path, JobSettings.read(run.path), wait=False)
        jobs = hand_over(request, run, forgive=True, after=before)
    waits = f"; it waits until job {', '.join(before)} has saved and ended" if before else ""
    return f"{run.path.name}: submitted again as job {', '.join(jobs)}{waits}"


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _request_of(run: RunDirectory, newest: run_jobs.Submission) -> SubmitRequest:
    """The request that the run's newest submission was made from."""
    request = make(
        str(run.run_yaml),
        [],
        nodes=newest.nodes,
        cluster=newest.cluster,
        name=run.path.name,
        run_dir=Path(run.path),
        time_limit=newest.time_limit,
        ranks_per_node=newest.ranks_per_node,
        chain=newest.chain,
        spares=newest.spares,
    )
    if Path(request.cluster.run_root).is_absolute():
        return request
    # It was relative to the directory of the submission, which may be another one now.
    return replace(request, cluster=replace(request.cluster, run_root=str(_root_of(run))))


def _root_of(run: RunDirectory) -> Path:
    """The run root that the run was submitted in: where its quarantine is."""
    with contextlib.suppress(UserError, OSError):
        if (quarantine := JobSettings.read(run.path).quarantine) is not None:
            return Path(quarantine).parent
    return run.path.absolute().parent
