"""A run that was killed and resumed is the run that was not, bit for bit; a restore that forgets anything is not."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.paths import GENERATORS, STATE, iteration_dir
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.conftest import command, environment, run
from tests.distributed import jobs
from tests.processes.waiting import wait_for_lines

STEPS, HALF = 24, 12
LAYOUT = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]


def overrides(tokens: Path) -> list[str]:
    dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
    length = [f"training.train_iters={STEPS}", f"checkpoint.save_interval={HALF}", "training.eval_interval=8"]
    length += ["training.global_batch_size=2", "training.eval_iters=1"]
    return [f"data.path={tokens}", *LAYOUT, *dropout, *length, "metrics.tensorboard=false"]


def final_hashes(run_dir: Path) -> dict[str, str]:
    return jobs.tensor_hashes(iteration_dir(run_dir / "checkpoints", STEPS))


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(1, STEPS + 1))
    return [record["lm_loss"] for record in records]


@pytest.fixture(scope="module")
def straight(tokens, tmp_path_factory) -> Path:
    """All steps at a stretch."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run("launch.train", "tiny_dense", *overrides(tokens), "--run-dir", run_dir, check=True)
    return run_dir


def test_killed_and_resumed_is_bit_equal(straight, tokens, tmp_path):
    run_dir = tmp_path / "run"
    arguments = command("launch.train", "tiny_dense", *overrides(tokens), "--run-dir", run_dir)
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
    wait_for_lines(process, run_dir / "metrics.jsonl", HALF + 5)
    os.kill(process.pid, signal.SIGKILL)  # the ranks die with their launcher
    process.wait()
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"iter_{HALF:07d}"
    assert not iteration_dir(run_dir / "checkpoints", STEPS).exists()

    again = run("launch.train", "tiny_dense", *overrides(tokens), "--run-dir", run_dir, check=True)
    assert f"resumed from {iteration_dir(run_dir / 'checkpoints', HALF)}" in again.stderr
    assert losses(run_dir) == losses(straight)
    assert final_hashes(run_dir) == final_hashes(straight)


def test_a_killed_rank_costs_the_steps_since_the_last_local_checkpoint(straight, tokens, tmp_path):
    """No checkpoint is committed before the end."""
    run_dir = tmp_path / "run"
    local = ["checkpoint.save_interval=0", "checkpoint.local_interval=2", f"checkpoint.local_dir={tmp_path}/local"]
    words = ["launch.train", "tiny_dense", *overrides(tokens), *local, "--run-dir", run_dir]
    process = subprocess.Popen(command(*words), env=environment(), stderr=subprocess.DEVNULL)
    wait_for_lines(process, run_dir / "metrics.jsonl", HALF + 5)
    ranks = [child for child in psutil.Process(process.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait() == 76
    assert not list((run_dir / "checkpoints").glob("iter_*"))
    again = run(*words, check=True)
    (began,) = re.findall(r"resumed from a local checkpoint at iteration (\d+)\n", again.stderr)
    reached = int(json.loads((run_dir / "performance.json").read_text())["attempts"][0]["iteration"])
    assert reached - 2 * 2 < int(began) <= reached
    assert losses(run_dir) == losses(straight)
    assert final_hashes(run_dir) == final_hashes(straight)
    assert not list((tmp_path / "local").rglob("*.safetensors"))


VARIANTS = {
    "bf16": (2, "tiny_dense", ["precision.dtype=bf16", *LAYOUT]),
    "EP2": (2, "tiny_moe", ["parallel.expert_model_parallel_size=2"]),
    "PP2xVPP2": (
        2,
        "tiny_dense",
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    ),
    "DP2, batch ramp": (2, "tiny_dense", ["training.rampup_batch_size=[2, 2, 4]", "training.global_batch_size=4"]),
    "saved in the background": (2, "tiny_dense", ["checkpoint.async_save=true", *LAYOUT]),
    "overlapped": (2, "tiny_dense", ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumes_bit_equal_in_every_mode(variant, pool, tokens, tmp_path):
    ranks, recipe, changes = VARIANTS[variant]
    length = ["training.train_iters=4", "checkpoint.save_interval=2", "training.eval_iters=1"]
    small = ["training.global_batch_size=2", "model.hidden_dropout=0.1"]
    config = resolve(recipe, [f"data.path={tokens}", *length, *small, *changes], RECIPES)
    whole = tmp_path / "whole"
    RunDirectory(whole).claim(config)
    assert pool[ranks].run(jobs.attempt, config, whole) == [0] * ranks
    shutil.copytree(whole, tmp_path / "again")
    last = iteration_dir(tmp_path / "again" / "checkpoints", 4)
    shutil.rmtree(last)
    assert pool[ranks].run(jobs.attempt, config, tmp_path / "again") == [0] * ranks
    assert jobs.tensor_hashes(last) == jobs.tensor_hashes(iteration_dir(whole / "checkpoints", 4))


def forget(part: str, checkpoint: Path, fresh: Path) -> None:
    """Leaves one part out of a restore: the checkpoint says of it what a fresh run would have."""
    if part == "generators":
        shutil.copyfile(fresh / GENERATORS, checkpoint / GENERATORS)
    elif part != "nothing":
        state = json.loads((checkpoint / STATE).read_text())
        (state if part == "optimizer_step" else state["progress"])[part] = 0
        if part == "consumed_samples":  # the counter and the ledger say the same
            (phase,) = state["data"]["phases"]
            phase |= {"samples": 0, "counts": {"data": 0}}
            state["data"]["positions"]["data"]["taken"] = 0
        (checkpoint / STATE).write_text(json.dumps(state))
    names = manifest.files_in(checkpoint)
    entries = {name: manifest.hash_file(checkpoint / name) for name in names}
    manifest.write(checkpoint, entries, iteration=HALF, attempt=1)


@pytest.mark.parametrize("part", ["nothing", "generators", "schedule_iteration", "consumed_samples", "optimizer_step"])
def test_restore_without_a_part_is_noticed(part, straight, pool, tokens, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    shutil.rmtree(iteration_dir(run_dir / "checkpoints", STEPS))
    config = resolve("tiny_dense", overrides(tokens), RECIPES)
    fresh = tmp_path / "fresh" / "checkpoints"
    if part == "generators":
        pool[2].run(jobs.train, config, 0, fresh)
    forget(part, iteration_dir(run_dir / "checkpoints", HALF), iteration_dir(fresh, 0))
    assert pool[2].run(jobs.attempt, config, run_dir) == [0, 0]
    assert RunDirectory(run_dir).newest_attempt() == 2
    equal = final_hashes(run_dir) == final_hashes(straight)
    assert equal is (part == "nothing")
