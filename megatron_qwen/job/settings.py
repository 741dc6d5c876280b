"""job.json: what the controller of a run's jobs needs to know in addition to run.yaml."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import atomic_write_json

NAME = "job.json"
# What ``job.alerts`` can tell of a run.
Event = Literal["stopped", "lost", "hang", "node_excluded", "requeued", "done", "cancelled"]
EVENTS: tuple[Event, ...] = get_args(Event)


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
        mean_hours_between_faults: of one node, where the cluster file says; the ranks read it.
        quarantine: directory of the nodes that the runs of the cluster avoid; None shares none.
        quarantine_hours: for how long a failure speaks against a node; 0 is as long as the run lasts.
        spares: nodes of the job that run no ranks until one of the others fails.
        metrics_directory: where node_exporter reads metrics of its node; None writes them to the run directory only.
        metrics_port: where the controller serves them; None serves none.
        metrics_address: address it listens on.
        alert_command: called with an event on its stdin; empty calls none.
        alert_webhook_variable: variable that holds a URL to which events are posted; None posts none.
        alert_on: events that are told.
    """

    scheduler: Literal["slurm", "local"]
    signal_delay_s: int
    requeue: bool = True
    python: str = "python3"
    srun_arguments: tuple[str, ...] = ()
    rank_prefix: tuple[str, ...] = ()
    health_check: tuple[str, ...] | None = None
    mean_hours_between_faults: float | None = None
    quarantine: str | None = None
    quarantine_hours: float = 24.0
    spares: int = 0
    metrics_directory: str | None = None
    metrics_port: int | None = None
    metrics_address: str = "127.0.0.1"
    alert_command: tuple[str, ...] = ()
    alert_webhook_variable: str | None = None
    alert_on: tuple[str, ...] = ()

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
