"""What submitit pickles, and what ``python -m megatron_qwen.job.call RUN_DIR`` does: become the controller of a run."""

import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.config.source import resolve
from megatron_qwen.errors import EXIT_DO_NOT_REQUEUE, EXIT_FAILURE, UserError
from megatron_qwen.job.allocation import JobAllocation, LocalAllocation
from megatron_qwen.job.controller import JobController
from megatron_qwen.job.membership import joins
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.job.slurm_allocation import SlurmAllocation
from megatron_qwen.log_lines import LogFormatter
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.resilience.storage import is_fault
from megatron_qwen.rundir import RunDirectory, RunState
from megatron_qwen.slurm import SlurmError


@dataclass(frozen=True)
class Job:
    """A call that needs only a path, so that the pickle holds no state and no secret.

    Args:
        run_dir: the run directory.
        world_size: ranks of a run without Slurm.
    """

    run_dir: str
    world_size: int

    def __call__(self) -> None:
        """Runs the controller and ends the process with the exit code of ``resilience.rules``.

        It does not return to submitit, which would pickle the return value and turn every end into exit code 0.
        """
        code_dir = str(RunDirectory(self.run_dir).code)
        if os.environ.get("PYTHONPATH") != code_dir:
            # The tasks of an array start with the code of the array's first run: start again with this run's own copy.
            command = [sys.executable, "-P", "-u", "-m", "megatron_qwen.job.call", self.run_dir, str(self.world_size)]
            os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": code_dir})
        code = control(Path(self.run_dir), world_size=self.world_size)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def control(run_dir: Path, *, world_size: int | None = None) -> int:
    """Runs the controller in this process.

    Args:
        run_dir: a run directory with run.yaml and job.json.
        world_size: ranks of a run without Slurm; None: as many as its layout needs.

    Returns:
        The exit code by the policy's table.
    """
    if not run_dir.is_dir():  # nothing is made in the place of a file system that is not mounted
        print(f"{run_dir} is not there", file=sys.stderr)
        return EXIT_FAILURE
    _log_to(RunDirectory(run_dir))
    # submitit's handlers would requeue in the middle of a step; these only take note of the signal.
    signals = StopSignals()
    signals.install()
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    directory = RunDirectory(run_dir)
    try:
        settings = JobSettings.read(run_dir)
        if world_size is None:
            world_size = resolve(str(directory.run_yaml), [], RECIPES).parallel.model_parallel_size
        allocation: JobAllocation = (
            SlurmAllocation(settings) if settings.scheduler == "slurm" else LocalAllocation(settings, world_size)
        )
        if isinstance(allocation, SlurmAllocation) and not joins(directory, allocation.job_id):
            return EXIT_DO_NOT_REQUEUE
        # Here, because `mq launch` imports this file and needs no metrics.
        from megatron_qwen.job.monitor import Monitor

        with Monitor(directory, settings):
            try:
                return JobController(directory, settings, allocation, signals).run()
            except UserError as error:  # here, so that the last metrics have the state that follows
                return _unusable(directory, error)
    except UserError as error:
        return _unusable(directory, error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        logging.getLogger(__name__).error("the controller failed: %s%s", where, error.strerror or error)
        return EXIT_FAILURE if is_fault(error) else EXIT_DO_NOT_REQUEUE  # the first may pass: see rescue.py


def _unusable(directory: RunDirectory, error: UserError) -> int:
    """The exit code where no attempt was made: the run's files, or what Slurm says of the job, cannot be used."""
    logging.getLogger(__name__).error("%s", error.render())
    cause = error.__context__
    if isinstance(error, SlurmError) or (isinstance(cause, OSError) and is_fault(cause)):
        return EXIT_FAILURE  # it may answer later: see rescue.py
    directory.write_status(RunState.STOPPED, exit_code=EXIT_DO_NOT_REQUEUE, reason=f"{error.kind}: {error}".strip())
    return EXIT_DO_NOT_REQUEUE


def _log_to(directory: RunDirectory) -> None:
    """Logs to the job's output and to logs/controller.log, to which every job of the run appends."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    try:
        directory.controller_log.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(directory.controller_log))
    except OSError as error:
        print(f"cannot write controller.log, logging to the terminal only: {error}", file=sys.stderr)
    for handler in handlers:
        handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


if __name__ == "__main__":
    sys.exit(control(Path(sys.argv[1]), world_size=int(sys.argv[2]) if len(sys.argv) > 2 else None))
