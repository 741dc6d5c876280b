"""A run of eight steps with local checkpoints every two, and what it is without faults."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.checkpoint.local.piece import PieceName
from megatron_qwen.checkpoint.paths import iteration_dir
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.checkpoint.local import runs
from tests.distributed import jobs

STEPS = 8


@dataclass
class LocalRun:
    """A run directory and the directories of its nodes.

    Args:
        pool: its ranks.
        config: its configuration.
        root: of both.
    """

    pool: Any
    config: RunConfig
    root: Path

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.root / "run"

    def attempt(self, *nodes: str, fail_after: int | None = None) -> list[dict[str, Any]]:
        """One attempt on these nodes, a rank each."""
        answers: list[dict[str, Any]] = self.pool[len(nodes)].run(
            runs.attempt, self.config, self.run_dir, nodes, fail_after
        )
        return answers

    def place(self, node: str) -> Path:
        """The directory of the run's pieces on a node."""
        (user,) = (self.root / "nodes" / node).iterdir()
        (found,) = user.iterdir()
        return found

    def pieces(self, node: str) -> list[PieceName]:
        """The pieces on a node."""
        base = self.root / "nodes" / node
        return sorted(name for path in base.rglob("*.safetensors") if (name := PieceName.of(path.name)))

    def hashes(self) -> dict[str, str]:
        """Of the tensors of the last checkpoint."""
        return jobs.tensor_hashes(iteration_dir(self.run_dir / "checkpoints", STEPS))


def config_of(tokens: Path, root: Path, *changes: str, recipe: str = "tiny_dense") -> RunConfig:
    """The run, without a checkpoint before its end."""
    length = [f"training.train_iters={STEPS}", "checkpoint.save_interval=0", "training.eval_iters=0"]
    small = ["training.global_batch_size=2", "model.hidden_dropout=0.1", "metrics.tensorboard=false"]
    local = ["checkpoint.local_interval=2", f"checkpoint.local_dir={root}/nodes/%n"]
    return resolve(recipe, [f"data.path={tokens}", *length, *small, *local, *changes], RECIPES)


@pytest.fixture
def local_run(pool, tokens, tmp_path) -> Callable[..., LocalRun]:
    """Makes a run with changes of its configuration."""

    def make(*changes: str, recipe: str = "tiny_dense", name: str = "one") -> LocalRun:
        run = LocalRun(pool, config_of(tokens, tmp_path / name, *changes, recipe=recipe), tmp_path / name)
        RunDirectory(run.run_dir).claim(run.config)
        return run

    return make


@pytest.fixture(scope="session")
def undisturbed(pool, tokens, tmp_path_factory) -> dict[str, str]:
    """Hashes of the plain run."""
    root = tmp_path_factory.mktemp("undisturbed")
    run = LocalRun(pool, config_of(tokens, root, "checkpoint.local_interval=null"), root)
    RunDirectory(run.run_dir).claim(run.config)
    assert [answer["code"] for answer in run.attempt("a", "b")] == [0, 0]
    return run.hashes()
