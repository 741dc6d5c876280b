"""What people do to a run, in any order: nothing committed is lost, no healthy run is ended, every state is true.

Each run gets its own random sequence of commands; several run beside each other. A run's seed is in its name.
"""

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from megatron_qwen import slurm
from megatron_qwen.checkpoint.paths import committed
from tests.conftest import command, environment
from tests.processes.other_user import NOBODY
from tests.slurm.runs import ClusterRun, Runs, lost_iterations
from tests.tiers import count

SEEDS = range(count(quick=3, thorough=30))
AT_ONCE = 3
ACTIONS = count(quick=4, thorough=10)
# One rank; a step takes so long that some commands meet a run in the middle of its work.
WORDS = ("training.train_iters=60",)
ENDING = ("cancel", "scancel")


class Story:
    """A run, and what was done to it.

    Args:
        runs: how to act on it.
        run: as it was submitted.
        words: of the submission.
        seed: of the sequence.
    """

    def __init__(self, runs, run: ClusterRun, words: list[object], seed: int) -> None:
        self.runs, self.run, self.words = runs, run, words
        self.random = random.Random(seed)
        self.committed = 0
        self.done: list[str] = []

    def act(self) -> None:
        """One more thing, and what must hold after it."""
        action = self.random.choice(["cancel", "requeue", "submit", "train", "look", "scancel", "wait", "wait"])
        before = self.states()
        self.done.append(f"{action} {before}")
        getattr(self, action)()
        after = self.states()
        if action not in (*ENDING, "requeue"):  # requeue asks a running job to save and come back
            healthy = {job for job, state in before.items() if state == "RUNNING"}
            ended = {job for job in healthy if after.get(job) == "CANCELLED"}
            assert not ended, self.story()
        self.check()

    def check(self) -> None:
        """No committed iteration is gone, and the state is the one of Slurm and of the files."""
        newest = (committed(self.run.path / "checkpoints") or [(0, None)])[0][0]
        assert newest >= self.committed, self.story()
        self.committed = newest
        before = self.states(), self.run.status()["state"]
        (row,) = json.loads(self.runs.mq("status", self.run.path, "--json"))
        if before != (self.states(), self.run.status()["state"]):
            return  # it has changed under the look
        jobs = set(before[0].values())
        state = row["state"]
        self.done.append(f"{state}: {row['reason']}")
        if state == "running":
            assert jobs & {"RUNNING", "COMPLETING", "CONFIGURING"} or self.by_hand(), self.story()
        elif state in ("queued", "requeued"):
            assert jobs & {"PENDING", "COMPLETING", "REQUEUED", "CONFIGURING"}, self.story()
        elif state == "cancelled":
            assert not jobs & {"PENDING", "SUSPENDED"}, self.story()
        elif state == "held":
            assert row["advice"], self.story()
        elif state == "stopped":  # by the person who trained it by hand
            assert self.by_hand(), self.story()
        else:
            assert state == "done", self.story()
            assert newest == 60, self.story()

    def by_hand(self) -> bool:
        return self.run.attempts()[-1].job_id is None

    def states(self) -> dict[str, str]:
        """What Slurm says of every job that the run has had."""
        lines = self.runs.cluster.ask("squeue", "-h", "-t", "all", "-n", self.run.path.name, "-o", "%i %T")
        return dict(line.split() for line in lines.splitlines())

    def alive(self) -> list[str]:
        return [job for job, state in self.states().items() if state not in slurm.ENDED]

    def cancel(self) -> None:
        self.runs.mq("cancel", self.run.path)

    def scancel(self) -> None:
        for job in self.alive():
            self.runs.cluster.ask("scancel", job, check=False)

    def requeue(self) -> None:
        told = self.runs.mq("requeue", self.run.path, check=False)
        assert told.startswith("0") or "is done" in told or "held" in told or "requeue" in told, told

    def submit(self) -> None:
        told = self.runs.mq("submit", *self.words, check=False)
        assert told.startswith("0") or "already in progress" in told or "is already done" in told, told

    def train(self) -> None:
        """By hand: refused where a job is there, else some steps."""
        alive, first = self.alive(), self.run.iteration()
        words = [*self.runs.words(*WORDS), "--run-dir", self.run.path, "--nproc", 1]
        env = {**environment(), **self.runs.cluster.environment}
        with subprocess.Popen(command("launch.train", *words), env=env, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and self.run.iteration() < first + 3 and time.monotonic() < deadline:
                time.sleep(0.1)
            if process.poll() is None:
                refused = self.runs.mq("submit", *self.words, check=False)
                assert "is being trained by hand" in refused or process.poll() is not None, refused
                process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        self.done.append(f"by hand: {process.returncode}")
        if process.returncode == 2:
            assert "is in use by job" in said, said
        else:
            assert process.returncode in (0, 75), said
            assert not [job for job in alive if job in self.alive()], self.story()

    def look(self) -> None:
        """Status as another user."""
        words = [NOBODY, "launch.command", "status", self.run.path, "--json"]
        env = {**environment(), **self.runs.cluster.environment}
        found = subprocess.run(
            command("tests.processes.other_user", *words),
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert found.returncode == 0, found.stderr + self.story()
        (row,) = json.loads(found.stdout)
        assert row["state"] in ("running", "queued", "requeued", "cancelled", "done", "held", "stopped"), (
            f"{row}{self.story()}"
        )

    def wait(self) -> None:
        deadline, first = time.monotonic() + self.random.uniform(0.2, 3.0), self.run.iteration()
        while time.monotonic() < deadline and self.run.iteration() < first + 12:
            self.runs.cluster.hasten()
            time.sleep(0.2)

    def finish(self) -> None:
        """It is finished at most with a requeue, and is the run that nobody has disturbed."""
        self.run.wait(lambda: not self.alive() or self.run.status()["state"] == "done", "rest", timeout_s=120)
        if self.run.status()["state"] != "done":
            self.runs.mq("requeue", self.run.path)
        self.run.wait(lambda: self.run.status()["state"] == "done", "an end", timeout_s=150)
        assert lost_iterations(self.run.path) == 0, self.story()
        assert self.run.hashes() == self.runs.undisturbed(1, *WORDS), self.story()
        assert [one.number for one in self.run.attempts()] == list(range(1, len(self.run.attempts()) + 1))

    def story(self) -> str:
        return "\n".join([*self.done, self.run.story()])


@pytest.fixture
def open_runs(cluster, tokens, tokenizer):
    """Runs in a directory that other users may read, which those below pytest's own may not be."""
    if os.getuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory(prefix="mq_runs_") as place:
        Path(place).chmod(0o755)
        yield Runs(cluster, tokens, tokenizer, Path(place))


@pytest.mark.parametrize("first", range(0, len(SEEDS), AT_ONCE))
def test_any_order_of_commands(open_runs, first):
    runs, stories = open_runs, []
    for seed in SEEDS[first : first + AT_ONCE]:
        name = f"interleaved_{seed}"
        run = runs.submit(name, *WORDS, nodes=1)
        run.path.chmod(0o755)
        words = [*runs.words(*WORDS), "--cluster", runs.cluster_file(), "--nodes", 1, "--name", name]
        stories.append(Story(runs, run, words, seed))
    for story in stories:
        story.run.wait_for_step(2)
    for _ in range(ACTIONS):
        for story in stories:
            story.act()
            story.run.path.chmod(0o755)
    for story in stories:
        story.finish()
