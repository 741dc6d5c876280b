"""Runs that begin from another: a stem and its branch compute what one run does; weights alone begin a new run."""

import pytest
import yaml

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.paths import committed, iteration_dir
from megatron_qwen.config.checks import problems
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.config import earlier
from tests.distributed import jobs
from tests.rank_pool import RankError
from tests.training.attempts import attempt, configure

STEM, DECAY = 6, 4
DROPOUT = ["model.hidden_dropout=0.1", "optim.lr_warmup_iters=2"]
WSD = [f"training.train_iters={STEM + DECAY}", "optim.lr_decay_style=wsd", f"optim.lr_wsd_decay_iters={DECAY}"]


@pytest.fixture(scope="module")
def stem(pool, tokens, tmp_path_factory):
    """A constant run with a checkpoint where the branch begins, kept though it is not the newest."""
    run_dir = tmp_path_factory.mktemp("stem") / "run"
    length = ["training.train_iters=9", "optim.lr_decay_style=constant", "checkpoint.save_interval=2"]
    kept = [f"checkpoint.save_at=[{STEM}]", "checkpoint.keep_last=1"]
    attempt(pool, 2, configure("tiny_dense", tokens, *DROPOUT, *length, *kept), run_dir)
    assert [iteration for iteration, _ in committed(run_dir / "checkpoints")] == [9, STEM]
    return run_dir


def branch(pool, tokens, stem, run_dir, *overrides):
    begin = f"checkpoint.branch_from={iteration_dir(stem / 'checkpoints', STEM)}"
    return attempt(pool, 2, configure("tiny_dense", tokens, *DROPOUT, *WSD, begin, *overrides), run_dir)


def test_stem_and_branch_are_one_run(stem, pool, tokens, tmp_path):
    """Bit for bit, with dropout: weights, moments, data and generators go on."""
    whole = attempt(pool, 2, configure("tiny_dense", tokens, *DROPOUT, *WSD), tmp_path / "whole")
    records = branch(pool, tokens, stem, tmp_path / "branch")
    assert [record["iteration"] for record in records] == list(range(STEM + 1, STEM + DECAY + 1))
    assert [record["lm_loss"] for record in records] == [record["lm_loss"] for record in whole[STEM:]]
    assert [record["learning_rate"] for record in records] == [record["learning_rate"] for record in whole[STEM:]]
    last = [iteration_dir(tmp_path / name / "checkpoints", STEM + DECAY) for name in ("whole", "branch")]
    assert jobs.tensor_hashes(last[0]) == jobs.tensor_hashes(last[1])


def test_loading_is_another_thing(stem, pool, tokens, tmp_path):
    """The control: from the same checkpoint by checkpoint.load a run begins at iteration 0 with its own data."""
    begin = f"checkpoint.load={iteration_dir(stem / 'checkpoints', STEM)}"
    records = attempt(pool, 2, configure("tiny_dense", tokens, *DROPOUT, *WSD, begin), tmp_path / "run")
    assert records[0]["iteration"] == 1


def test_a_branch_resumes_from_itself(stem, pool, tokens, tmp_path):
    run_dir = tmp_path / "run"
    branch(pool, tokens, stem, run_dir, "training.train_iters=8")
    records = branch(pool, tokens, stem, run_dir)
    assert [record["iteration"] for record in records][-2:] == [9, 10]
    assert len(records) == 4


def test_a_stem_that_is_not_there(pool, tokens, tmp_path):
    config = configure("tiny_dense", tokens, *WSD, f"checkpoint.branch_from={tmp_path}")
    RunDirectory(tmp_path / "run").claim(config)
    with pytest.raises(RankError, match=r"CheckpointError: .*no committed checkpoint"):
        pool[2].run(jobs.attempt, config, tmp_path / "run")


def test_a_run_of_an_earlier_version_resumes(pool, tokens, tmp_path):
    """Its run.yaml and those of its checkpoints have the RoPE base elsewhere; the run is the same, bit for bit."""
    length = ["training.train_iters=4", "checkpoint.save_interval=2", "optim.lr_decay_iters=4"]
    whole = attempt(pool, 1, configure("tiny_dense", tokens, *length, "rope.base=5e3"), tmp_path / "whole")
    half = ["training.train_iters=2", *length[1:]]
    attempt(pool, 1, configure("tiny_dense", tokens, *half, "rope.base=5e3"), tmp_path / "run")
    checkpoint = iteration_dir(tmp_path / "run" / "checkpoints", 2)
    for run_yaml in (tmp_path / "run" / "run.yaml", checkpoint / "run.yaml"):
        earlier.rewrite(run_yaml)
    entries = {name: manifest.hash_file(checkpoint / name) for name in manifest.files_in(checkpoint)}
    manifest.write(checkpoint, entries, iteration=2, attempt=1)
    records = attempt(pool, 1, configure("tiny_dense", tokens, *length, "model.rotary_base=5e3"), tmp_path / "run")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert [record["lm_loss"] for record in records] == [record["lm_loss"] for record in whole]
    other = attempt(pool, 1, configure("tiny_dense", tokens, *length), tmp_path / "other")
    assert other[-1]["lm_loss"] != whole[-1]["lm_loss"], "the base changes nothing: equal losses say nothing"


def test_a_checkpoint_has_the_rope_base_of_its_last_step(pool, tokens, tmp_path):
    stages = [
        {"name": "short", "weights": {"a": 1}, "tokens": 512},
        {"name": "long", "weights": {"a": 1}, "rotary_base": 5e5},
    ]
    blend = tmp_path / "blend.yaml"
    blend.write_text(yaml.safe_dump({"sources": {"a": {"path": str(tokens)}}, "stages": stages}))
    words = [f"data.blend={blend}", "rope.base=1e4", "training.train_iters=4", "checkpoint.save_interval=2"]
    config = resolve("tiny_dense", words, RECIPES)
    attempt(pool, 1, config, tmp_path / "run")
    found = [iteration_dir(tmp_path / "run" / "checkpoints", step) / "run.yaml" for step in (2, 4)]
    assert [resolve(str(path), [], RECIPES).rope.base for path in found] == [1e4, 5e5]
    assert resolve(str(tmp_path / "run" / "run.yaml"), [], RECIPES).rope == config.rope


def test_either_branch_or_load(tokens):
    config = configure("tiny_dense", tokens, "training.train_iters=3").with_section(
        "checkpoint", load="a", branch_from="b", save_at=(0, 3)
    )
    assert {"checkpoint.branch_from", "checkpoint.save_at"} <= {one.where for one in problems(config, world_size=1)}


def test_starts_from_another_runs_weights(finished_run, pool, tokens, tokenizer, tmp_path):
    overrides = [f"checkpoint.load={finished_run}", "training.train_iters=1", "optim.lr_warmup_iters=0"]
    config = configure("tiny_dense", tokens, *overrides)
    records = attempt(pool, 1, config, tmp_path / "run")
    assert records[0]["iteration"] == 1
    assert records[0]["consumed_samples"] == 4
    fresh = attempt(pool, 1, configure("tiny_dense", tokens, *overrides[1:]), tmp_path / "fresh")
    assert records[0]["lm_loss"] < fresh[0]["lm_loss"] - 0.05
