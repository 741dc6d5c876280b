"""A study on a real Slurm: arrays, a node that dies, a cell that diverges, a bug, a controller killed twice."""

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter

import pytest
import yaml

from launch.sweeps.outcome import outcome
from megatron_qwen.attempts import AttemptLog
from tests.conftest import command, environment
from tests.tiers import cases

pytestmark = pytest.mark.timeout(1500)
RATES = cases([0.001, 0.003], [0.0015, 0.002, 0.004])
CELLS = 8 * len(RATES)
TIMEOUT_S = 900
PLACE = ("--nodes", "1", "--at-once", "6", "--poll", "1")


class Study:
    """The study, and what a person does with it."""

    def __init__(self, runs, folder):
        self.runs, self.path, self.plan_yaml = runs, folder / "forty", folder / "study.plan.yaml"
        self.environment = {**environment(), **runs.cluster.environment}
        words = [word for word in runs.words()[1:] if not word.startswith(("model.", "training.", "checkpoint."))]
        content = {
            "name": "forty",
            "recipe": "tiny_dense",
            "overrides": [*words, "training.eval_iters=0"],
            "shapes": {"models": [{"num_layers": 2}, {"num_layers": 3}]},
            "horizons": {"tokens": [5120, 7680, 10240, 12800]},
            "learning_rate": {"values": sorted(RATES)},
            "batch_tokens": {"values": [256]},
            "decay_share": 0.5,
            "device": {"tflops": 0.01},
        }
        (folder / "study.yaml").write_text(yaml.safe_dump(content))
        self.sweep("plan", folder / "study.yaml").communicate(timeout=100)
        plan = yaml.safe_load(self.plan_yaml.read_text())
        assert len(plan["cells"]) == CELLS
        assert len(plan["stems"]) == 2 * len(RATES)
        wild, bug = plan["cells"][CELLS // 4 + 1], plan["cells"][2 * CELLS // 3 + 1]
        self.wild, self.bug = wild["name"], bug["name"]
        wild["learning_rate"] = 1000.0
        bug["min_learning_rate"] = 1.0  # above the peak
        self.plan_yaml.write_text(yaml.safe_dump(plan))
        self.plan = plan

    def sweep(self, *words):
        """Begins ``mq sweep``."""
        return subprocess.Popen(
            command("launch.sweep", *map(str, words)),
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def rows(self):
        """What the database holds."""
        with sqlite3.connect(self.path / "state.sqlite", timeout=30) as database:
            found = database.execute("SELECT name, kind, status, why, loss FROM runs").fetchall()
        return {row[0]: row for row in found}

    def attempts(self, name):
        return AttemptLog(self.path / "runs" / name / "attempts.jsonl").read()

    def jobs(self, name):
        path = self.path / "runs" / name / "jobs.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def until(self, ready, what, *, timeout_s=TIMEOUT_S):
        """Waits, and has Slurm start requeued jobs sooner than it would."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.runs.cluster.hasten()
            queue = self.runs.cluster.ask("squeue", "-r", "-t", "all", check=False)
            assert time.monotonic() < deadline, f"no {what}\n{self.rows()}\n{queue}"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    """The study at its end, with what was done to it on the way."""
    study = Study(runs, tmp_path_factory.mktemp("sweep"))
    place = ("--cluster", runs.cluster_file(), *PLACE)
    first = study.sweep("submit", study.plan_yaml, "--study", study.path, *place)
    study.until(lambda: (study.path / "arrays.jsonl").is_file() and first.stdout.readline(), "array", timeout_s=120)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    # As if it had been killed after sbatch and before a word of it was written down, and the database lost with it.
    began = [path.parent for path in study.path.glob("runs/*/jobs.jsonl")]
    assert len(began) > 1
    for directory in began:
        (directory / "jobs.jsonl").unlink()
    study.unnoted = [directory.name for directory in began]
    (study.path / "state.sqlite").unlink()
    second = study.sweep("resume", study.path, *place)
    cells = [cell["name"] for cell in study.plan["cells"]]
    study.until(lambda: sum(len(study.attempts(name)) > 0 for name in cells) >= 4, "branches")
    node = busy_node(study)
    runs.cluster.kill_node(node)
    os.kill(second.pid, signal.SIGKILL)
    second.communicate()
    third = study.sweep("resume", study.path)  # where its runs went before
    study.until(lambda: third.poll() is not None, "end")
    assert third.returncode == 1, third.stdout.read()  # one failed
    return study, node


def busy_node(study):
    """A node that runs a task of the study."""
    found = []

    def busy():
        found[:] = study.runs.cluster.ask("squeue", "-h", "-r", "-t", "R", "-o", "%N").split()
        return bool(found)

    study.until(busy, "busy node")
    return found[0]


def test_all_are_done_but_two_which_are_what_they_are(finished):
    study, _ = finished
    rows = study.rows()
    cells = {cell["name"] for cell in study.plan["cells"]}
    assert Counter(rows[name][2] for name in cells) == {"done": CELLS - 2, "diverged": 1, "failed": 1}
    assert rows[study.wild][2] == "diverged"
    assert rows[study.bug][2] == "failed"
    assert "optim.min_learning_rate" in rows[study.bug][3]
    assert {rows[stem["name"]][2] for stem in study.plan["stems"]} == {"done"}


def test_none_ran_twice_but_what_the_dead_node_had(finished):
    study, node = finished
    for name in study.rows():
        if name == study.bug:
            assert not (study.path / "runs" / name).exists()
            continue
        assert len(study.jobs(name)) <= 1, name  # none where it was taken away
        attempts = study.attempts(name)
        assert attempts[-1].exit_code == 0 or name == study.wild, (name, attempts)
        for lost in attempts[:-1]:
            # After a node has died Slurm 22.05 sometimes refuses the first step: nothing was done then.
            assert node in lost.nodes or lost.gained == 0, (name, attempts)
    # Their jobs were under way when every word of them was taken away: nobody submitted them again.
    assert len(study.unnoted) > 1
    assert not any(study.jobs(name) for name in study.unnoted)


def test_the_database_is_what_the_directories_say(finished):
    study, _ = finished
    rows = study.rows()
    for run in (*study.plan["stems"], *study.plan["cells"]):
        if run["name"] == study.bug:
            continue
        stem = study.path / "runs" / run["stem"] if "stem" in run else None
        directory = study.path / "runs" / run["name"]
        found = outcome(directory, iterations=run["iterations"], stem=stem, begins=run.get("from", 0))
        assert rows[run["name"]][2] == found.status
        assert found.status != "done" or rows[run["name"]][4] == pytest.approx(found.loss)


def test_runs_of_one_shape_go_as_arrays(finished):
    study, _ = finished
    stems = {stem["name"] for stem in study.plan["stems"]}
    shapes: dict[str, set[tuple[bool, str]]] = {}
    for name in study.rows():
        for job in (job for one in study.jobs(name) for job in one["jobs"] if "_" in job):
            shapes.setdefault(job.partition("_")[0], set()).add((name in stems, name[:2]))
    assert len(shapes) >= 3
    assert all(len(each) == 1 for each in shapes.values())
