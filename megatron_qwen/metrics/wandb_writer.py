"""Weights & Biases, the only file that imports it."""

from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError, Problem


class WandbWriter:
    """Logs records to a Weights & Biases project.

    Args:
        project: the project.
        run_dir: its name is the run's id at Weights & Biases, so that a resumed run continues there.
        config: the resolved configuration.
    """

    def __init__(self, project: str, *, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                Problem(
                    "metrics.wandb_project", project, "needs the wandb package: pip install 'megatron_qwen[wandb]'."
                )
            ) from None
        self._run = wandb.init(project=project, id=run_dir.name, resume="allow", dir=str(run_dir), config=config)

    def write(self, record: dict[str, Any]) -> None:
        """Logs one record."""
        self._run.log(record, step=record["iteration"])

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()
