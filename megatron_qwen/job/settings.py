"""job.json: what the controller of a run's jobs needs to know in addition to run.yaml."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import atomic_write_json

NAME = "job.json"


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Written at submission, read by every job of the run.

    Args:
        scheduler: slurm, or local for one machine without it.
        signal_delay_s: seconds before the time limit at which Slurm sends SIGUSR2.
        requeue: whether a job that can be resumed requeues itself; in a chain the next job resumes the run instead.
        python: interpreter of the ranks, inside the container where there is one.
        srun_arguments: further arguments of srun, such as those of a pyxis container.
        rank_prefix: command that wraps the ranks' command, such as ``apptainer exec``.
        health_check: arguments of slurm/healthcheck.sh; None skips the check.
    """

    scheduler: Literal["slurm", "local"]
    signal_delay_s: int
    requeue: bool = True
    python: str = "python3"
    srun_arguments: tuple[str, ...] = ()
    rank_prefix: tuple[str, ...] = ()
    health_check: tuple[str, ...] | None = None

    def write(self, run_dir: Path) -> None:
        """Writes job.json."""
        atomic_write_json(run_dir / NAME, asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> "JobSettings":
        """Reads job.json.

        Raises:
            ConfigError: it is missing or not a valid job.json.
        """
        path = run_dir / NAME
        try:
            content = json.loads(path.read_text())
            values = {item.name: content[item.name] for item in fields(cls) if item.name in content}
            tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return cls(**{**values, **tuples})
        except (OSError, ValueError, TypeError) as error:
            fix = f"cannot be read ({error}); `mq launch submit` or `mq launch freeze` writes it."
            raise ConfigError(Problem(str(path), None, fix)) from None
