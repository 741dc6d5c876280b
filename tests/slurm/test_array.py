"""Many runs as one job array."""

import json
import signal

import yaml

from tests.slurm.runs import ClusterRun, kill
from tests.tiers import count

RUNS = count(quick=8, thorough=12)
TASKS = count(quick=2, thorough=3)
BROKEN = "run_05"
# Long enough steps for a fault to fall between them.
TINY_BATCH = "training.global_batch_size=24"


def test_runs_four_at_a_time_one_of_them_broken(runs, tmp_path):
    file = tmp_path / "study.yaml"
    own = {f"run_{index:02d}": [f"training.seed={100 + index}"] for index in range(RUNS)}
    own[BROKEN].append("optim.learning_rate=1e30")
    words = [word for word in runs.words() if not word.startswith("training.train_iters")]
    content = {"recipe": words[0], "overrides": [*words[1:], "training.train_iters=12"], "runs": own}
    file.write_text(yaml.safe_dump(content))
    root = runs.root / "array"
    root.mkdir()
    where = ("--cluster", runs.cluster_file(), "--nodes", 1, "--at-once", 4, "--run-root", root)
    submitted = json.loads(runs.mq("array", file, *where, "--json"))
    assert [item["name"] for item in submitted] == sorted(own)
    found = [ClusterRun(runs.cluster, root / item["name"], item["jobs"]) for item in submitted]
    most = 0

    def over() -> bool:
        nonlocal most
        most = max(most, len(runs.cluster.ask("squeue", "-h", "-t", "R").splitlines()))
        return all(run.status()["state"] in ("done", "stopped") for run in found)

    found[0].wait(over, "end of the array", timeout_s=240)
    states = {run.path.name: run.status()["state"] for run in found}
    assert states.pop(BROKEN) == "stopped"
    assert set(states.values()) == {"done"}
    assert all(len(run.attempts()) == 1 for run in found), "none was repeated"
    assert 1 < most <= 4
    table = runs.mq("status", root)
    assert table.count(" done ") == RUNS - 1
    assert f"{BROKEN} is stopped: mq launch requeue" in table
    assert len({json.dumps(run.hashes()) for run in found if run.path.name != BROKEN}) == RUNS - 1


def test_a_fault_in_the_last_task_is_its_own(runs, tmp_path):
    """Slurm gives the last task the number of the whole array."""
    file = tmp_path / "three.yaml"
    words = [word for word in runs.words() if not word.startswith("training.global_batch_size")]
    own = {f"three_{index}": [f"training.seed={index}"] for index in range(TASKS)}
    file.write_text(yaml.safe_dump({"recipe": words[0], "overrides": [*words[1:], TINY_BATCH], "runs": own}))
    where = ("--cluster", runs.cluster_file(), "--nodes", 1, "--run-root", runs.root)
    submitted = json.loads(runs.mq("array", file, *where, "--json"))
    found = [ClusterRun(runs.cluster, runs.root / item["name"], item["jobs"]) for item in submitted]
    last = found[-1]
    last.wait_for_step(12)
    kill(last.rank_processes()[0], signal.SIGKILL)
    for run in found:
        run.wait_for_end()
    assert [len(run.attempts()) for run in found] == [*[1] * (TASKS - 1), 2]
    assert last.attempts()[0].reason == "lost peer"
