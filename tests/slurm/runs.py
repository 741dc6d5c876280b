"""Tiny runs on the cluster of the tests: submitted as a user does, watched through the files a user has."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.json_lines import objects
from megatron_qwen.resilience.standby import is_ready
from tests.conftest import command, environment, run
from tests.distributed import jobs
from tests.slurm.cluster import SlurmCluster

SAVE_INTERVAL = 10
STEPS = 50
# Runs of the fault tests: two ranks on two nodes, tensor parallel. A step computes little and waits, so that there is
# time for a fault between two steps and processor time for the tests beside.
PAUSE = "time.sleep(0.12)"
TINY = (
    "model.num_layers=2",
    f"training.train_iters={STEPS}",
    f"checkpoint.save_interval={SAVE_INTERVAL}",
    "checkpoint.keep_last=20",
    "training.eval_interval=0",
    "training.global_batch_size=2",
    "metrics.tensorboard=false",
    "performance.threads_per_rank=1",
)
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
_CLUSTER = {
    "scheduler": "slurm",
    "partition": "train",
    "gpus_per_node": 1,
    "time_limit": "30:00",
    "signal_delay_s": 10,
    "environment": {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""},
    "health_check_arguments": ["--gpus", "0"],  # the cluster's GPUs are names without a driver
}


class Runs:
    """Submits, waits, looks.

    Args:
        cluster: the real Slurm.
        tokens: prefix of the token file.
        tokenizer: its tokenizer.
        root: where runs go.
    """

    def __init__(self, cluster: SlurmCluster, tokens: Path, tokenizer: Path, root: Path) -> None:
        self.cluster, self.tokens, self.tokenizer, self.root = cluster, tokens, tokenizer, root
        self.undisturbed = cache(self._undisturbed)

    def cluster_file(self, **changes: Any) -> Path:
        """A cluster file, the usual one with changes."""
        path = self.root / f"cluster_{abs(hash(json.dumps(changes, sort_keys=True)))}.yaml"
        path.write_text(json.dumps({**_CLUSTER, "run_root": str(self.root), **changes}))
        return path

    def mq(self, action: str, *arguments: object, environ: dict[str, str] | None = None, check: bool = True) -> str:
        """``mq launch ACTION``; answers with stdout, or stderr too where it may fail."""
        env = {**environment(), **self.cluster.environment, **(environ or {})}
        done = subprocess.run(
            command("launch.command", action, *arguments), capture_output=True, text=True, env=env, timeout=120
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout if check else f"{done.returncode}\n{done.stdout}{done.stderr}"

    def words(self, *overrides: str) -> list[str]:
        """Recipe and overrides of a tiny run."""
        return ["tiny_dense", f"data.path={self.tokens}", f"data.tokenizer={self.tokenizer}", *TINY, *overrides]

    def submit(
        self,
        name: str,
        *overrides: str,
        nodes: int = 2,
        options: tuple[object, ...] = (),
        patch: str = PAUSE,
        **cluster: Any,
    ) -> "ClusterRun":
        """Submits a run whose trainer does something more in each step, by a change of the snapshot that it runs.

        Args:
            name: of the run.
            overrides: of its configuration.
            nodes: of the job.
            options: more of the command line.
            patch: lines at the beginning of ``Trainer.step``; ``iteration`` is the step's number, ``attempt`` a text.
                A snapshot that a test has made stays as it is.
            cluster: changes of the cluster file.
        """
        where = ("--cluster", self.cluster_file(**cluster), "--nodes", nodes, "--name", name)
        if patch and not (self.root / name / "code").exists():
            self.freeze_with(name, patch, *self.words(*overrides), *where)
        answer = json.loads(self.mq("submit", *self.words(*overrides), *where, *options, "--json"))
        return ClusterRun(self.cluster, Path(answer[0]["run_dir"]), answer[0]["jobs"])

    def freeze_with(self, name: str, patch: str, *words: object) -> None:
        """Freezes a run with a change of its code; ``words`` are those of its submission."""
        self.mq("freeze", *words)
        self._patch(self.root / name / "code/megatron_qwen/training/trainer.py", patch)

    def _patch(self, trainer: Path, patch: str) -> None:
        text = trainer.read_text()
        mark = "components, config, progress = self.components, self.components.config, self.components.progress\n"
        assert text.count(mark) == 1
        before = ["import os", 'attempt = os.environ.get("MQ_ATTEMPT")', "iteration = progress.iteration + 1"]
        lines = "".join(f"        {line}\n" for line in [*before, *patch.strip().splitlines()])
        trainer.write_text(text.replace(mark, mark + lines))

    def _undisturbed(self, ranks: int, *overrides: str) -> dict[str, str]:
        """Hashes of the weights that ``mq train`` reaches on this machine under the same layout."""
        run_dir = self.root / f"undisturbed_{ranks}_{abs(hash(overrides))}"
        run("launch.train", *self.words(*overrides), "--run-dir", run_dir, "--nproc", ranks, check=True)
        return jobs.tensor_hashes(committed(run_dir / "checkpoints")[0][1])


class ClusterRun:
    """A run that was submitted.

    Args:
        cluster: where.
        path: its directory.
        ids: its jobs.
    """

    def __init__(self, cluster: SlurmCluster, path: Path, ids: list[str]) -> None:
        self.cluster, self.path, self.jobs = cluster, path, ids

    @property
    def job(self) -> str:
        """Its job."""
        return self.jobs[0]

    def status(self) -> dict[str, Any]:
        """status.json."""
        content: dict[str, Any] = json.loads((self.path / "status.json").read_text())
        return content

    def attempts(self) -> list[Attempt]:
        """attempts.jsonl."""
        return AttemptLog(self.path / "attempts.jsonl").read()

    def iteration(self) -> int:
        """Last finished iteration."""
        path = self.path / "metrics.jsonl"
        records = list(objects(path.read_bytes().splitlines() if path.is_file() else []))  # a full disk cuts lines off
        return int(records[-1]["iteration"]) if records else 0

    def wait_for_step(self, iteration: int, *, timeout_s: float = 90) -> None:
        """Waits until the run has come so far."""
        self.wait(lambda: self.iteration() >= iteration, f"iteration {iteration}", timeout_s=timeout_s)

    def wait_for_attempt(self, number: int) -> None:
        """Waits until this attempt has begun."""
        self.wait(lambda: len(self.attempts()) >= number, f"attempt {number}", timeout_s=90)

    def wait_for_end(self, state: str = "done", *, timeout_s: float = 100) -> None:
        """Waits until the run is over, as it should be."""
        over = ("done", "stopped", "cancelled")
        self.wait(lambda: self.status()["state"] in over, "an end", timeout_s=timeout_s)
        assert self.status()["state"] == state, self.story()

    def wait(self, ready: Callable[[], bool], what: str, *, timeout_s: float) -> None:
        """Waits for something, and has Slurm start requeued jobs sooner than its two minutes."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.cluster.hasten()
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s\n{self.story()}"
            time.sleep(0.3)

    def hashes(self) -> dict[str, str]:
        """Hashes of the newest checkpoint's tensors."""
        return jobs.tensor_hashes(committed(self.path / "checkpoints")[0][1])

    def wait_for_standby(self, attempt: int) -> None:
        """Waits until ranks are ready to take over from those of this attempt."""
        folder = self.path / "logs" / f"attempt_{attempt:03d}" / "standby"
        self.wait(lambda: is_ready(folder), "ranks that wait", timeout_s=90)

    def rank_processes(self) -> dict[int, int]:
        """Process of every rank of the newest attempt, by rank; not of those that wait for its end."""
        assert self.cluster.job_python is not None
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().decode().split("\0")
                if "megatron_qwen.train" in line and str(self.path) in line and "srun" not in line[0]:
                    items = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                    variables = dict(item.partition("=")[::2] for item in items)
                    if variables["MQ_ATTEMPT"] == str(self.attempts()[-1].number):
                        rank = int(variables["SLURM_PROCID"])
                        found[rank] = self.cluster.job_python.rank_of(int(path.name))
            except (OSError, KeyError):
                continue
        return found

    def controller_process(self) -> int:
        """Process of the job's controller."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "submitit.core._submit" in line and str(self.path / "submission") in line:
                return int(path.name)
        raise AssertionError("no controller")

    def end_of_story(self) -> str:
        """What the controllers said."""
        path = self.path / "logs/controller.log"
        return path.read_text() if path.is_file() else ""

    def story(self) -> str:
        """Everything that helps to understand a failure."""
        logs = "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in self.path.glob("logs/*/*.log"))
        queue = self.cluster.ask("squeue", "-t", "all", check=False)
        nodes = self.cluster.ask("sinfo", "-N", "-l", check=False)
        return f"{self.end_of_story()}\n{queue}{nodes}\n{self.attempts()}\n{logs}"


def lost_iterations(path: Path) -> int:
    """Iterations that were done more than once, at most in one restart."""
    counts: dict[int, int] = {}
    superseded = path / "metrics.superseded.jsonl"
    for record in objects(superseded.read_bytes().splitlines() if superseded.is_file() else []):
        attempt = int(record["attempt"])
        counts[attempt] = counts.get(attempt, 0) + 1
    return max(counts.values(), default=0)


def hold_for_standby(runs: Runs, name: str, iteration: int) -> str:
    """Line of a patch: the first attempt takes this step once ranks wait for its end."""
    ready = runs.root / name / "logs/attempt_001/standby/ready"
    waits = f"not (os.path.exists('{ready}') and os.path.getsize('{ready}'))"
    return f"while attempt == '1' and iteration == {iteration} and {waits}: time.sleep(0.1)"


def kill(process: int, number: int) -> None:
    """Sends a rank a signal."""
    os.kill(process, number)
