"""Runs with LoRA: their checkpoints hold adapters alone, and go on beside the weights that these are for."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from megatron_qwen.checkpoint.paths import LORA_BASE, STATE, iteration_dir
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.rundir import RunDirectory
from tests.conftest import command, environment, run
from tests.distributed import jobs
from tests.distributed.layouts import CP2, EP2, PP2, SP, TP2
from tests.processes.waiting import wait_for_lines
from tests.tiers import cases
from tests.training import ranks
from tests.training.attempts import attempt
from tests.training.test_sft import sft

STEPS, HALF = 8, 4
LAYOUTS = {"one rank": (1, {}), "TP2+SP": (2, TP2 | SP), "PP2": (2, PP2), "CP2 or EP2": (2, CP2)}
LORA = {"rank": 4, "alpha": 8.0}
LOUD = {"learning_rate": 0.01, "lr_warmup_iters": 0, "clip_grad": 0.0}


def config_of(recipe, documents, start, *, layout=None, lora=None, **sections):
    length = {"train_iters": STEPS, "global_batch_size": 2, "eval_iters": 1, "eval_interval": 2}
    config = sft(recipe, documents, start, layout=layout, training=length, lora=LORA | (lora or {}), **sections)
    config = config.with_section("optim", **LOUD)
    return config.with_section("checkpoint", save_interval=HALF, keep_last=9)


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def final_hashes(run_dir):
    return jobs.tensor_hashes(iteration_dir(run_dir / "checkpoints", STEPS))


@pytest.fixture(scope="module", params=cases(["tiny_dense"], ["tiny_moe"]))
def straight(request, pool, starts, masked_documents, tmp_path_factory):
    """All steps at a stretch on two ranks, and its configuration."""
    recipe, run_dir = request.param, tmp_path_factory.mktemp("straight") / "run"
    config = config_of(recipe, masked_documents, starts[recipe])
    attempt(pool, 2, config, run_dir)
    return recipe, config, run_dir


def half_done(run_dir, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(iteration_dir(again / "checkpoints", STEPS))
    return again


def test_a_checkpoint_holds_adapters_alone(straight, starts):
    recipe, _, run_dir = straight
    names = list(CheckpointReader(iteration_dir(run_dir / "checkpoints", STEPS)).tensors())
    assert names
    assert all("_lora." in name for name in names)
    assert any(name.startswith("optimizer.") for name in names)
    base = json.loads((iteration_dir(run_dir / "checkpoints", STEPS) / STATE).read_text())[LORA_BASE]
    assert base["path"] == str(iteration_dir(starts[recipe], 0))


@pytest.mark.parametrize("note", [True, False], ids=["with its note", "without its note"])
def test_resumed_under_the_same_layout_it_is_the_same_run(note, straight, pool, tmp_path):
    _, config, run_dir = straight
    again = half_done(run_dir, tmp_path)
    if not note:
        (again / "lora_base.json").unlink()
    assert pool[2].run(jobs.attempt, config, again) == [0, 0]
    assert final_hashes(again) == final_hashes(run_dir)
    assert losses(again) == losses(run_dir)
    assert (again / "lora_base.json").is_file()


@pytest.mark.parametrize("name", cases(["TP2+SP"], ["PP2", "one rank", "CP2 or EP2"]))
def test_resumed_under_another_layout_losses_agree(name, straight, pool, tmp_path):
    recipe, config, run_dir = straight
    size, layout = LAYOUTS[name]
    if recipe == "tiny_moe":
        layout = {"CP2 or EP2": EP2, "TP2+SP": layout | {"expert_tensor_parallel_size": 1}}.get(name, layout)
    again = half_done(run_dir, tmp_path)
    assert pool[size].run(jobs.attempt, jobs.with_layout(config, layout), again) == [0] * size
    assert losses(again) == pytest.approx(losses(run_dir), rel=1e-6)


def moved(start, tmp_path):
    place = tmp_path / "base" / "checkpoints"
    shutil.copytree(start, place)
    return place


def test_a_base_that_was_moved_is_found_where_it_is_named(pool, starts, masked_documents, tmp_path):
    place = moved(starts["tiny_dense"], tmp_path)
    run_dir = tmp_path / "run"
    config = config_of("tiny_dense", masked_documents, place)
    attempt(pool, 1, config, run_dir)
    shutil.rmtree(iteration_dir(run_dir / "checkpoints", STEPS))
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    with pytest.raises(AssertionError, match=r"is not there, and .*/base/checkpoints does not have them either"):
        pool[1].run(jobs.attempt, config, run_dir)
    config = config.with_section("checkpoint", load=str(elsewhere))
    assert pool[1].run(jobs.attempt, config, run_dir) == [0]


def test_other_weights_are_never_taken_for_the_base(pool, starts, masked_documents, tmp_path):
    place = moved(starts["tiny_dense"], tmp_path)
    run_dir = tmp_path / "run"
    config = config_of("tiny_dense", masked_documents, place)
    attempt(pool, 1, config, run_dir)
    shutil.rmtree(iteration_dir(run_dir / "checkpoints", STEPS))
    # The same shapes: a later checkpoint of the base's run now stands where the base was.
    whole = tmp_path / "whole"
    plain = config.with_section("lora", rank=None).with_section("training", train_iters=1)
    attempt(pool, 1, plain, whole)
    shutil.rmtree(iteration_dir(place, 0))
    shutil.copytree(iteration_dir(whole / "checkpoints", 1), iteration_dir(place, 0))
    with pytest.raises(AssertionError, match="has other weights now"):
        pool[1].run(jobs.attempt, config, run_dir)


def test_adapters_begin_a_run_with_adapters_and_no_other(straight, pool, tmp_path):
    _, config, run_dir = straight
    further = config.with_section("checkpoint", load=str(run_dir / "checkpoints"))
    attempt(pool, 2, further, tmp_path / "further")
    assert losses(tmp_path / "further")[0] < losses(run_dir)[0]
    state = json.loads((iteration_dir(tmp_path / "further" / "checkpoints", STEPS) / STATE).read_text())
    assert (
        state[LORA_BASE] == json.loads((iteration_dir(run_dir / "checkpoints", STEPS) / STATE).read_text())[LORA_BASE]
    )
    plain = further.with_section("lora", rank=None)
    RunDirectory(tmp_path / "plain").claim(plain)
    with pytest.raises(AssertionError, match="holds adapters \\(LoRA\\) alone: merge them first"):
        pool[1].run(jobs.attempt, plain, tmp_path / "plain")
    other = further.with_section("lora", rank=8)
    RunDirectory(tmp_path / "other").claim(other)
    with pytest.raises(AssertionError, match=r"have rank 4 and are scaled by 2: set lora\.rank=4 lora\.alpha=8"):
        pool[1].run(jobs.attempt, other, tmp_path / "other")


def test_adapters_are_not_taken_with_another_scale(straight, pool, tmp_path):
    _, config, run_dir = straight
    further = config.with_section("checkpoint", load=str(run_dir / "checkpoints"))
    for name, change in (("alpha", {"alpha": 16.0}), ("rs", {"use_rslora": True})):
        other = further.with_section("lora", **change)
        RunDirectory(tmp_path / name).claim(other)
        with pytest.raises(AssertionError, match=r"set lora\.rank=4 lora\.alpha=8 lora\.use_rslora=false"):
            pool[1].run(jobs.attempt, other, tmp_path / name)


def test_a_flipped_frozen_weight_is_found(straight, pool, tmp_path):
    _, config, _ = straight
    RunDirectory(tmp_path / "run").claim(config)
    assert pool[1].run(ranks.flip_a_frozen_weight, config, tmp_path / "run") == ["frozen"]


def test_another_model_named_before_the_first_checkpoint_is_the_base(pool, starts, masked_documents, tmp_path):
    """A start that failed has noted its base; the next one may name another."""
    config = config_of("tiny_dense", masked_documents, starts["tiny_dense"])
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config)
    pool[1].run(ranks.steps_from, config, tmp_path / "run", 0)
    shutil.rmtree(directory.checkpoints)
    place = moved(starts["tiny_dense"], tmp_path)
    pool[1].run(ranks.steps_from, config.with_section("checkpoint", load=str(place)), tmp_path / "run", 0)
    assert json.loads(directory.lora_base.read_text())["named"] == str(place)


@pytest.mark.parametrize(("name", "size", "layout"), [("PP2", 2, PP2), *cases([], [("TP2+SP", 2, TP2 | SP)])])
def test_matrices_that_are_trained_whole(name, size, layout, pool, masked_documents, tmp_path):
    """With tied embeddings, whose copy on the last stage is trained alike."""
    tied = {"share_embeddings_and_output_weights": True}
    base = config_of("tiny_dense", masked_documents, None).with_section("lora", rank=None).with_section("model", **tied)
    pool[1].run(jobs.start_from, base, tmp_path / "base")
    for frozen in (True, False):
        saved = {} if frozen else {"modules_to_save": ("embed_tokens",)}
        config = config_of("tiny_dense", masked_documents, tmp_path / "base" / "checkpoints", lora=saved)
        config = config.with_section("model", **tied)
        (alone,) = pool[1].run(ranks.steps_from, config, _new(tmp_path / f"alone{frozen}"), 3)
        config = jobs.with_layout(config, layout)
        for steps in pool[size].run(ranks.steps_from, config, _new(tmp_path / f"split{frozen}"), 3):
            assert [one["loss"] for one in steps] == pytest.approx([one["loss"] for one in alone], rel=1e-6)
            assert [one["grad_norm"] for one in steps] == pytest.approx([one["grad_norm"] for one in alone], rel=1e-5)
        checkpoint = iteration_dir(tmp_path / f"split{frozen}" / "checkpoints", 3)
        assert ("embedding.word_embeddings.weight" in CheckpointReader(checkpoint).tensors()) is not frozen


def _new(path):
    path.mkdir()
    return path


@pytest.mark.parametrize("recipe", ["tensorwise", *cases([], ["blockwise"])])
def test_the_base_may_compute_in_fp8(recipe, pool, starts, masked_documents, tmp_path):
    """Emulated. The first loss is that of the base in FP8, to the bit, since adapters begin with zeros."""
    precision = {"fp8": recipe, "emulate_fp8": True, "dtype": "fp32"}
    config = config_of("tiny_dense", masked_documents, starts["tiny_dense"], precision=precision)
    (steps,) = pool[1].run(ranks.steps_from, config, _new(tmp_path / "lora"), STEPS)
    whole = config.with_section("lora", rank=None)
    (first,) = pool[1].run(ranks.steps_from, whole, _new(tmp_path / "whole"), 1)
    plain = config_of("tiny_dense", masked_documents, starts["tiny_dense"])
    (exact,) = pool[1].run(ranks.steps_from, plain, _new(tmp_path / "plain"), 1)
    assert steps[0]["loss"] == first[0]["loss"] != exact[0]["loss"]
    assert steps[0]["grad_norm"] > 0
    assert steps[1]["loss"] != steps[0]["loss"]


@pytest.mark.parametrize("layout", cases([], [TP2 | SP]))
def test_dropout_is_the_same_after_a_resume(layout, pool, starts, masked_documents, tmp_path):
    config = config_of("tiny_dense", masked_documents, starts["tiny_dense"], lora={"dropout": 0.2}, layout=layout)
    attempt(pool, 2, config, tmp_path / "run")
    again = half_done(tmp_path / "run", tmp_path)
    assert pool[2].run(jobs.attempt, config, again) == [0, 0]
    assert final_hashes(again) == final_hashes(tmp_path / "run")
    without = config.with_section("lora", dropout=0.0)
    attempt(pool, 2, without, tmp_path / "without")
    assert losses(tmp_path / "without")[0] == losses(tmp_path / "run")[0]  # lora_B is 0
    assert losses(tmp_path / "without")[1] != losses(tmp_path / "run")[1]


def test_a_killed_run_goes_on(starts, masked_documents, tmp_path):
    config = config_of("tiny_dense", masked_documents, starts["tiny_dense"])
    ends = {}
    for name in cases(["killed"], ["straight"]):
        RunDirectory(tmp_path / name).claim(config)
        words = ("launch.train", tmp_path / name / "run.yaml", "--run-dir", tmp_path / name, "--nproc", 2)
        if name == "killed":
            process = subprocess.Popen(command(*words), env=environment(), stderr=subprocess.DEVNULL)
            wait_for_lines(process, tmp_path / name / "metrics.jsonl", HALF + 2)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        done = run(*words, check=True)
        assert ("resumed from" in done.stderr) == (name == "killed")
        assert "the frozen weights are those of" in done.stderr
        ends[name] = final_hashes(tmp_path / name), losses(tmp_path / name)
    assert len({json.dumps(end) for end in ends.values()}) == 1
