"""A run on the cluster is the run that ``mq train`` makes on one machine."""

import json
import os
import signal
import stat
import subprocess
import sys

from megatron_qwen.checkpoint.paths import committed
from tests.conftest import ROOT
from tests.distributed import jobs
from tests.slurm.runs import STEPS, TP2


def test_two_nodes_with_two_ranks_each(runs):
    cluster = {"gpus_per_node": 2, "cpus_per_rank": 1, "memory_per_rank_gib": 1.5, "exclusive": True}
    run = runs.submit("two_by_two", *TP2, patch="", **cluster)
    run.wait_for_end()
    (attempt,) = run.attempts()
    assert (attempt.reason, attempt.nodes, attempt.gained) == ("finished", ("n1", "n2"), STEPS)
    assert run.hashes() == runs.undisturbed(4, *TP2)
    log = (run.path / "logs/attempt_001/rank_0.log").read_text()
    assert "4 ranks meet at 127.0.0.1:" in log
    assert "n1 (" in log
    assert "ranks 2 (local 0," in log, "the first rank of the second node"
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    (submitted,) = (run.path / "submission").glob("*_submission.sh")
    where = ("--cluster", runs.cluster_file(**cluster), "--nodes", 2, "--name", "two_by_two", "--json")
    shown = json.loads(runs.mq("dry-run", *runs.words(*TP2), *where))
    assert shown["sbatch"] == submitted.read_text(), "a dry run shows what is submitted"
    assert "--mem=3072M" in shown["sbatch"]


def test_the_job_runs_the_code_of_its_submission(runs):
    words = [*runs.words("training.train_iters=4"), "--cluster", runs.cluster_file(), "--nodes", 1, "--name", "frozen"]
    runs.mq("freeze", *words)
    code = runs.root / "frozen" / "code"
    trainer = code / "megatron_qwen/training/trainer.py"
    trainer.write_text(trainer.read_text() + "\nprint('the snapshot speaks')\n")
    run = runs.submit("frozen", "training.train_iters=4", nodes=1)
    run.wait_for_end()
    assert "the snapshot speaks" in (run.path / "logs/attempt_001/rank_0.log").read_text()
    note = json.loads((code / "snapshot.json").read_text())
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert note["commit"] == (head.stdout.strip() if (ROOT / ".git").exists() else None)


def test_plain_sbatch_gives_the_same(runs, tmp_path):
    run_dir = runs.root / "plain"
    environment = {**os.environ, **runs.cluster.environment, "MQ_SECRET_TOKEN": "do-not-carry-me"}
    # The environment of the tests, and not one that mq would make.
    venv = {"MQ_VENV": str(sys.prefix)}
    options = ["--nodes=2", "--ntasks-per-node=1", "--export=PATH,HOME,SLURM_CONF,MQ_VENV,OMP_NUM_THREADS"]
    done = subprocess.run(
        [
            "sbatch",
            "--parsable",
            *options,
            f"--output={tmp_path}/plain.out",
            f"--chdir={ROOT}",
            "slurm/train.sbatch",
            run_dir,
            *runs.words(*TP2),
            "--cluster",
            runs.cluster_file(),
        ],
        cwd=ROOT,
        env={**environment, **venv},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    from tests.slurm.runs import ClusterRun

    run = ClusterRun(runs.cluster, run_dir, [done.stdout.strip()])
    run.wait(lambda: (run_dir / "status.json").is_file(), "status", timeout_s=60)
    run.wait_for_end()
    assert jobs.tensor_hashes(committed(run_dir / "checkpoints")[0][1]) == runs.undisturbed(2, *TP2)
    assert run.attempts()[0].nodes == ("n1", "n2")


def test_cancelled_runs_save_and_stay_so(runs):
    run = runs.submit("cancelled", *TP2)
    run.wait_for_step(3)
    assert "cancelled job" in runs.mq("cancel", run.path)
    run.wait(lambda: run.attempts()[-1].ended is not None, "an end", timeout_s=60)
    run.wait_for_end("cancelled")
    assert run.attempts()[-1].reason == "cancelled"
    assert committed(run.path / "checkpoints")[0][0] == run.iteration(), "it saved before it left"
    assert "submitted again" in runs.mq("requeue", run.path)
    run.wait_for_end()
    assert run.hashes() == runs.undisturbed(2, *TP2)


def test_a_chain_goes_on_in_its_next_job(runs):
    """Three jobs that may not requeue: a fault in the first, the rest in the second, nothing left for the third."""
    run = runs.submit("chain", *TP2, "resilience.restart_in_job=false", options=("--chain", 3))
    assert len(run.jobs) == 3
    run.wait_for_step(12)
    os.kill(run.rank_processes()[1], signal.SIGKILL)
    run.wait_for_end()
    first, second = run.attempts()
    assert (first.reason, first.job_id, second.reason, second.job_id) == (
        "lost peer",
        run.jobs[0],
        "finished",
        run.jobs[1],
    )
    run.wait(lambda: not runs.cluster.ask("squeue", "-h"), "end of the chain", timeout_s=60)
    last = runs.cluster.ask("scontrol", "show", "job", "-o", run.jobs[2])
    assert "JobState=COMPLETED" in last
    assert "the run is done already" in run.end_of_story()
    assert run.hashes() == runs.undisturbed(2, *TP2)
