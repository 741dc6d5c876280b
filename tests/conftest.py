"""Real text, a real tokenizer, real tokens and real ranks, made once for all tests."""

import fcntl
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from launch.demo import standard_library
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.distributed import jobs
from tests.processes.client import ForkServer
from tests.rank_pool import RankPool
from tools.dev.benchmarks import browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parent.parent
# For mutation runs: looking for the smallest example that fails takes minutes, and nobody reads it.
hypothesis.settings.register_profile(
    "first_failure", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate], database=None
)
_FORK_SERVER = ForkServer()


def pytest_configure() -> None:
    """Programs under test are forked from one interpreter that has imported their libraries."""
    _FORK_SERVER.install()


def pytest_unconfigure() -> None:
    """Ends that interpreter."""
    _FORK_SERVER.close()


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again, here or in what is forked from here."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of ``-n auto``."""
    from tests.schedule import WORKERS

    return WORKERS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Tests that wait beside tests that compute."""
    from tests.schedule import Schedule

    return Schedule(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of several processes may fail once. Those that do are listed at the end: each is a defect to mend."""
    from tests.schedule import may_be_repeated

    for item in items:
        if may_be_repeated(item.nodeid):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the time went, above pytest's closing line."""
    from tests.schedule import table

    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    for line in table(seconds):
        terminalreporter.write_line(line)
    for report in terminalreporter.stats.get("rerun", ()):
        terminalreporter.write_line(f"failed at its first try: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


@pytest.fixture
def own_interpreters() -> Iterator[None]:
    """Every program that the test starts gets an interpreter of its own: for what a fork shows wrongly.

    That is its memory (libraries that it never imported are there) and its command line in /proc.
    """
    with _FORK_SERVER.disabled():
        yield


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that all workers of a test run share; the first to ask makes it, the others wait.

    Args:
        tmp_path_factory: of a worker, whose own base lies in one that all share.
        name: of the directory.
        make: fills it. A failure is met by whoever asks next, which tries again.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    directory, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            directory.mkdir(exist_ok=True)
            make(directory)
            done.touch()
    return directory


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

    def make(directory: Path) -> None:
        text = "".join(json.dumps(document) + "\n" for document in standard_library(600_000))
        (directory / "corpus.jsonl").write_text(text)

    return made_once(tmp_path_factory, "corpus", make) / "corpus.jsonl"


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 320 ids, the vocabulary of the tiny recipes."""

    def make(directory: Path) -> None:
        words = ("tokenizer", "train", "--vocab-size", "320", "--output", directory / "bpe", corpus)
        run("tools.data", *words, check=True)

    return made_once(tmp_path_factory, "tokenizer", make) / "bpe"


@pytest.fixture(scope="session")
def tokens(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the token file of ``corpus``."""

    def make(directory: Path) -> None:
        run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", directory / "corpus", corpus, check=True)

    return made_once(tmp_path_factory, "tokens", make) / "corpus"


@pytest.fixture(scope="session")
def finished_run(pool: "Pools", tokens: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps with checkpoints at four and eight; copy it before changing it."""

    def make(directory: Path) -> None:
        make_run(pool, "tiny_dense", tokens, tokenizer, directory / "run")

    return made_once(tmp_path_factory, "finished", make) / "run"


def make_run(pool: "Pools", recipe: str, tokens: Path, tokenizer: Path, run_dir: Path) -> Path:
    """Trains eight steps on one rank as ``mq train`` does."""
    files = [f"data.path={tokens}", f"data.tokenizer={tokenizer}"]
    config = resolve(recipe, [*files, "training.train_iters=8", "checkpoint.save_interval=4"], RECIPES)
    RunDirectory(run_dir).claim(config)
    assert pool[1].run(jobs.attempt, config, run_dir) == [0]
    return run_dir


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    """A browser without a window; where CI has none that is a failure."""
    if browser.program() is None:
        reason = "Chromium is not installed: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with browser.running() as running:
        yield running


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
