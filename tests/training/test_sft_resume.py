"""Fine-tuning that stops in the middle of a packed epoch goes on as if it had not, under this layout or another."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.paths import STATE, iteration_dir
from megatron_qwen.rundir import RunDirectory
from tests.conftest import command, environment, run
from tests.distributed import jobs
from tests.distributed.layouts import CP2, EP2, PP2, SP, TP2
from tests.processes.waiting import wait_for_lines
from tests.tiers import cases
from tests.training.test_sft import LENGTH, sft

# Two rows a step: the first epoch has 21 rows or more, so that it is stopped in its middle and passes into the second.
STEPS, HALF = 12, 6
LAYOUTS = {"one rank": (1, {}), "TP2+SP": (2, TP2 | SP), "PP2": (2, PP2), "CP2 or EP2": (2, CP2)}


def config_of(recipe, documents, start, layout=None):
    length = {"train_iters": STEPS, "global_batch_size": 2, "eval_iters": 1, "eval_interval": 2}
    config = sft(recipe, documents, start, layout=layout, training=length)
    # So large a vocabulary that a row has several blocks of logits, and tokens without loss are left out on one rank.
    return config.with_section("checkpoint", save_interval=HALF).with_section("model", vocab_size=8192)


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def final_hashes(run_dir):
    return jobs.tensor_hashes(iteration_dir(run_dir / "checkpoints", STEPS))


@pytest.fixture(scope="module", params=cases(["tiny_dense"], ["tiny_moe"]))
def straight(request, pool, masked_documents, tmp_path_factory):
    """All steps at a stretch on two ranks, and its configuration."""
    recipe = request.param
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    config = config_of(recipe, masked_documents, None)
    assert 2 * HALF < sum(masked_documents.lengths[:-6]) / LENGTH < 2 * STEPS
    RunDirectory(run_dir).claim(config)
    assert pool[2].run(jobs.attempt, config, run_dir) == [0, 0]
    return recipe, config, run_dir


def half_done(run_dir, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(iteration_dir(again / "checkpoints", STEPS))
    return again


def test_resumed_under_the_same_layout_it_is_the_same_run(straight, pool, tmp_path):
    _, config, run_dir = straight
    again = half_done(run_dir, tmp_path)
    assert pool[2].run(jobs.attempt, config, again) == [0, 0]
    assert final_hashes(again) == final_hashes(run_dir)
    assert losses(again) == losses(run_dir)


@pytest.mark.parametrize("name", cases(["TP2+SP", "PP2"], ["one rank", "CP2 or EP2"]))
def test_resumed_under_another_layout_losses_agree(name, straight, pool, tmp_path):
    recipe, config, run_dir = straight
    size, layout = LAYOUTS[name]
    again = half_done(run_dir, tmp_path)
    config = jobs.with_layout(config, EP2 if recipe == "tiny_moe" and layout == CP2 else layout)
    assert pool[size].run(jobs.attempt, config, again) == [0] * size
    assert losses(again) == pytest.approx(losses(run_dir), rel=1e-6)


def test_a_restore_that_forgets_its_place_is_noticed(straight, pool, tmp_path):
    """The control: the rows of the epoch are read again from the first."""
    _, config, run_dir = straight
    again = half_done(run_dir, tmp_path)
    checkpoint = iteration_dir(again / "checkpoints", HALF)
    state = json.loads((checkpoint / STATE).read_text())
    state["progress"]["consumed_samples"] = 0
    (phase,) = state["data"]["phases"]
    phase |= {"samples": 0, "counts": {"data": 0}}
    state["data"]["positions"]["data"]["taken"] = 0
    (checkpoint / STATE).write_text(json.dumps(state))
    entries = {name: manifest.hash_file(checkpoint / name) for name in manifest.files_in(checkpoint)}
    manifest.write(checkpoint, entries, iteration=HALF, attempt=1)
    assert pool[2].run(jobs.attempt, config, again) == [0, 0]
    assert final_hashes(again) != final_hashes(run_dir)
    assert losses(again)[-1] != pytest.approx(losses(run_dir)[-1], rel=1e-5)


def test_a_killed_run_goes_on(masked_documents, tmp_path):
    """Killed between two checkpoints, it takes the steps since the last one again."""
    config = config_of("tiny_dense", masked_documents, None)
    ends = {}
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        RunDirectory(tmp_path / name).claim(config)
        words = ("launch.train", tmp_path / name / "run.yaml", "--run-dir", tmp_path / name, "--nproc", 2)
        if name == "killed":
            process = subprocess.Popen(command(*words), env=environment(), stderr=subprocess.DEVNULL)
            wait_for_lines(process, tmp_path / name / "metrics.jsonl", HALF + 3)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not iteration_dir(tmp_path / name / "checkpoints", STEPS).exists()
        done = run(*words, check=True)
        assert ("resumed from" in done.stderr) == (name == "killed")
        ends[name] = final_hashes(tmp_path / name), losses(tmp_path / name)
    assert ends["straight"] == ends["killed"]
