"""Text to shards by a job array on the real cluster; one task is cancelled in the middle and sent once more."""

import json
import shlex
import time

from launch.demo import standard_library
from megatron_qwen.data.prepare.plan import make_plan
from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.token_files.manifest import read_manifest
from tests.conftest import ROOT, command, environment, run

TASKS = 4
SHARD_GIB = 0.002


def test_an_array_makes_the_shards_of_one_set(cluster, tokenizer, tmp_path):
    lines = "".join(json.dumps(document) + "\n" for document in standard_library(3_000_000))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(lines * 3)
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    arguments = ["--tokenizer", tokenizer, "--output", tmp_path / "out" / "set", "--shard-gib", SHARD_GIB]
    typed = shlex.join(command("tools.data", "prepare", *arguments, "--workers", 1, *names))
    script = f"cd {shlex.quote(str(ROOT))} && {typed} --task $SLURM_ARRAY_TASK_ID/{TASKS}"
    words = [
        "sbatch",
        "--parsable",
        f"--array=0-{TASKS - 1}",
        "-n",
        "1",
        "-o",
        str(tmp_path / "log_%a"),
        "--wrap",
        script,
    ]
    job = cluster.ask(*words, environment={**cluster.environment, **environment()}).strip()
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "set.work" / "task_2_of_4.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    cluster.ask("scancel", f"{job}_2", check=False)
    deadline = time.monotonic() + 120
    while cluster.ask("squeue", "-h", "-j", job, check=False).strip() and time.monotonic() < deadline:
        time.sleep(0.2)
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("log_*")))
    if read_manifest(tmp_path / "out" / "set") is None:  # the task was cancelled before it was done
        words[2] = "--array=2"
        job = cluster.ask(*words, environment={**cluster.environment, **environment()}).strip()
        deadline = time.monotonic() + 120
        while cluster.ask("squeue", "-h", "-j", job, check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        logs += (tmp_path / "log_2").read_text()
    noted = read_manifest(tmp_path / "out" / "set")
    assert noted is not None, logs
    options = {"tokenizer": tokenizer, "options": ReadOptions(), "shard_bytes": int(SHARD_GIB * (1 << 30))}
    plan = make_plan(find_inputs(names).files, prefix=tmp_path / "x", **options)
    assert len(noted.shards) == len(plan.shards) >= TASKS
    run("tools.data", "verify", tmp_path / "out" / "set", check=True)
    # The same tokens as one process makes.
    run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "one", *names, check=True)
    run("tools.data", "merge", "--single", "--output", tmp_path / "joined", tmp_path / "out" / "set", check=True)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"joined{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()
