"""What is wrong with a blend for a run is said before the run begins, or goes on, and nothing is replaced by it."""

import pytest
import yaml

from megatron_qwen.config.source import resolve
from megatron_qwen.data.reading.preflight import require_usable
from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run


def write(folder, tokens, *stages, **source):
    path = folder / "blend.yaml"
    path.write_text(yaml.safe_dump({"sources": {"a": {"path": str(tokens), **source}}, "stages": list(stages)}))
    return path


def test_every_stage_must_fall_on_the_ranks(tokens, tmp_path):
    stages = [
        {"name": "one", "weights": {"a": 1}, "tokens": 1000},
        {"name": "two", "weights": {"a": 1}, "global_batch_size": 6},
    ]
    config = resolve("tiny_dense", [f"data.blend={write(tmp_path, tokens, *stages)}"], RECIPES)
    require_usable(config, world_size=2)
    with pytest.raises(ConfigError, match=r"stage two: training\.global_batch_size = 6"):
        require_usable(config, world_size=4)


@pytest.mark.parametrize("change", [{"lengths": {32: 1}}, {"packing": "best_fit"}])
def test_independent_sequences_of_a_stage_under_context_parallelism(change, tokens, tmp_path):
    stage = {"name": "s", "weights": {"a": 1}, "seq_length": 64, "micro_batch_size": 2}
    source = {"packing": change["packing"]} if "packing" in change else {}
    path = write(tmp_path, tokens, stage | ({"lengths": change["lengths"]} if "lengths" in change else {}), **source)
    config = resolve("tiny_dense", [f"data.blend={path}", "parallel.context_parallel_size=2"], RECIPES)
    with pytest.raises(ConfigError, match=r"packed sequences require training\.micro_batch_size=1"):
        require_usable(config, world_size=2)


def test_a_blend_that_a_run_cannot_go_on_with_replaces_nothing(tokens, tmp_path):
    stage = {"name": "first", "weights": {"a": 1}, "seq_length": 64}
    words = [
        "tiny_dense",
        f"data.blend={write(tmp_path, tokens, stage)}",
        "training.train_iters=4",
        "training.eval_iters=0",
    ]
    run("launch.train", *words, "--run-dir", tmp_path / "run", check=True)
    kept = (tmp_path / "run" / "blend.yaml").read_text()
    write(tmp_path, tokens, {**stage, "name": "renamed"})
    done = run("launch.train", *words[:2], "training.train_iters=6", *words[3:], "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "is the current stage of the run, but the blend has only renamed" in done.stderr
    assert (tmp_path / "run" / "blend.yaml").read_text() == kept
    # The run itself goes on.
    words = [tmp_path / "run" / "run.yaml", "training.train_iters=6", "--run-dir", tmp_path / "run"]
    assert "resumed from" in run("launch.train", *words, check=True).stderr


def test_path_and_blend_are_not_both(tokens, tmp_path):
    path = write(tmp_path, tokens, {"name": "s", "weights": {"a": 1}})
    done = run("launch.train", "tiny_dense", f"data.path={tokens}", f"data.blend={path}", "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "cannot be combined with data.path" in done.stderr


def test_estimates_go_over_all_stages(tokens, tmp_path):
    """A longer second stage needs more memory, and its tokens count."""
    from launch.estimates import predict
    from launch.request import make

    stages = [
        {"name": "short", "weights": {"a": 1}, "tokens": "8M", "seq_length": 4096, "global_batch_size": 16},
        {"name": "long", "weights": {"a": 1}, "seq_length": 32768, "global_batch_size": 16},
    ]
    path = write(tmp_path, tokens, *stages)
    plain = predict(make("qwen2_5_7b", ["training.train_iters=200"], nodes=2, cluster=None, dry=True))
    staged = predict(
        make("qwen2_5_7b", ["training.train_iters=200", f"data.blend={path}"], nodes=2, cluster=None, dry=True)
    )
    steps = -(-8_000_000 // (16 * 4096))
    assert staged.tokens == steps * 16 * 4096 + (200 - steps) * 16 * 32768
    assert staged.memory.total_gib > plain.memory.total_gib
