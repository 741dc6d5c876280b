"""Real text, a real tokenizer, real tokens and real ranks, made once for all tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.demo import standard_library
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.distributed import jobs
from tests.rank_pool import RankPool

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def pool() -> Iterator["Pools"]:
    """Ranks by world size."""
    pools = Pools()
    yield pools
    pools.close()


class Pools:
    """``pools[n]`` is a pool of n ranks."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __getitem__(self, size: int) -> RankPool:
        return self._pools.setdefault(size, RankPool(size))

    def close(self) -> None:
        """Ends all ranks."""
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python sources as JSON lines, about 0.6 MB."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in standard_library(600_000)))
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 320 ids, the vocabulary of the tiny recipes."""
    directory = tmp_path_factory.mktemp("tokenizer") / "bpe"
    run("tools.data", "tokenizer", "train", "--vocab-size", "320", "--output", directory, corpus, check=True)
    return directory


@pytest.fixture(scope="session")
def tokens(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the token file of ``corpus``."""
    prefix = tmp_path_factory.mktemp("tokens") / "corpus"
    run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", prefix, corpus, check=True)
    return prefix


@pytest.fixture(scope="session")
def finished_run(pool: "Pools", tokens: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps with checkpoints at four and eight; copy it before changing it."""
    return make_run(pool, "tiny_dense", tokens, tokenizer, tmp_path_factory.mktemp("finished") / "run")


def make_run(pool: "Pools", recipe: str, tokens: Path, tokenizer: Path, run_dir: Path) -> Path:
    """Trains eight steps on one rank as ``mq train`` does."""
    files = [f"data.path={tokens}", f"data.tokenizer={tokenizer}"]
    config = resolve(recipe, [*files, "training.train_iters=8", "checkpoint.save_interval=4"], RECIPES)
    RunDirectory(run_dir).claim(config)
    assert pool[1].run(jobs.attempt, config, run_dir) == [0]
    return run_dir


@contextmanager
def small_disk(mount: Path, size: str) -> Iterator[Path]:
    """Mounts a file system of a size, such as ``16m``; skips the test where that needs privileges."""
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs needs privileges: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def run(
    module: str, *arguments: object, check: bool = False, timeout_s: float = 300, gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a program of the checkout as ``mq`` does, and captures what it prints."""
    done = subprocess.run(
        command(module, *arguments),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(gpu=gpu),
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def command(module: str, *arguments: object) -> list[str]:
    """The command line that ``mq`` ends in."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def environment(*, gpu: bool = False) -> dict[str, str]:
    """The environment that ``mq`` gives its programs, one thread each; without ``gpu``, on the CPU everywhere."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own} if gpu else {**os.environ, **own, "CUDA_VISIBLE_DEVICES": ""}
