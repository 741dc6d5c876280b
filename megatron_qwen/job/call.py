"""What submitit pickles, and what ``python -m megatron_qwen.job.call RUN_DIR`` does: become the controller of a run."""

import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.config.source import resolve
from megatron_qwen.errors import EXIT_DO_NOT_REQUEUE, EXIT_FAILURE, UserError
from megatron_qwen.job.allocation import find
from megatron_qwen.job.controller import JobController
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory, RunState


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
        """Runs the controller and ends the process with the exit code of ``resilience.policy``.

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
        return JobController(directory, settings, find(settings, world_size=world_size), signals).run()
    except UserError as error:
        # No attempt was made: the run's files, or what Slurm says about the job, cannot be used.
        logging.getLogger(__name__).error("%s", error.render())
        directory.write_status(RunState.STOPPED, exit_code=EXIT_DO_NOT_REQUEUE, reason=f"{error.kind}: {error}".strip())
        return EXIT_DO_NOT_REQUEUE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        logging.getLogger(__name__).error("the controller failed: %s%s", where, error.strerror or error)
        return EXIT_FAILURE


def _log_to(directory: RunDirectory) -> None:
    """Logs to the job's output and to logs/controller.log, to which every job of the run appends."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    try:
        directory.controller_log.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(directory.controller_log))
    except OSError as error:
        print(f"cannot write controller.log, logging to the terminal only: {error}", file=sys.stderr)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", handlers=handlers, force=True
    )


if __name__ == "__main__":
    sys.exit(control(Path(sys.argv[1]), world_size=int(sys.argv[2]) if len(sys.argv) > 2 else None))
