"""What hangs on the loop: metrics, ramps, profiles, background saves, validation, starting from another run."""

import importlib.util
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_qwen.checkpoint.paths import committed, iteration_dir
from megatron_qwen.config.source import resolve
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run
from tests.training.attempts import attempt, configure

LINE = {
    "iteration", "consumed_samples", "consumed_tokens", "lm_loss", "grad_norm", "learning_rate", "step_time_s",
    "tokens_per_second", "tokens_per_second_per_device", "model_tflops_per_device", "mfu", "skipped", "attempt",
}  # fmt: skip


def test_metrics_of_a_mixture_of_experts(pool, tokens, tmp_path):
    layout = ["parallel.expert_model_parallel_size=2"]
    records = attempt(pool, 2, configure("tiny_moe", tokens, "training.train_iters=5", *layout), tmp_path / "run")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    for record in records:
        assert record.keys() >= LINE
        assert record["mfu"] is None, "a CPU's peak is not known"
        assert 0.25 <= record["busiest_expert_share"] <= 1
        assert 0.9 < record["load_balancing_loss"] < 4
        assert record["attempt"] == 1
        assert not record["skipped"]
    assert records[-1]["consumed_samples"] == 20
    assert records[-1]["consumed_tokens"] == 20 * 64
    assert [record["iteration"] for record in records if "validation_loss" in record] == [5]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("lm_loss")] == pytest.approx(
        [record["lm_loss"] for record in records]
    )
    assert {"validation_loss", "busiest_expert_share", "grad_norm"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_moe_figures_do_not_depend_on_the_layout(ranks, pool, tokens, tmp_path):
    config = configure("tiny_moe", tokens, "training.train_iters=3", f"parallel.expert_model_parallel_size={ranks}")
    records = attempt(pool, ranks, config, tmp_path / "run")
    expected = attempt(pool, 1, configure("tiny_moe", tokens, "training.train_iters=3"), tmp_path / "one")
    for name in ("busiest_expert_share", "load_balancing_loss"):
        assert [record[name] for record in records] == pytest.approx([record[name] for record in expected], rel=1e-5)


def test_batch_ramp_and_profile_and_background_saves(pool, tokens, tmp_path):
    overrides = [
        "training.rampup_batch_size=[2, 2, 6]", "training.train_iters=6", "metrics.profile_start=3",
        "metrics.profile_iters=2", "checkpoint.save_interval=2", "checkpoint.async_save=true", "checkpoint.keep_last=2",
        "training.eval_iters=0",
    ]  # fmt: skip
    records = attempt(pool, 2, configure("tiny_dense", tokens, *overrides), tmp_path / "run")
    assert [record["global_batch_size"] for record in records] == [2, 2, 4, 4, 4, 4]
    assert [record["consumed_samples"] for record in records] == [2, 4, 8, 12, 16, 20]
    assert all("validation_loss" not in record for record in records)
    assert [iteration for iteration, _ in committed(tmp_path / "run" / "checkpoints")] == [6, 4]
    traces = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert traces == ["rank_0.json.gz", "rank_1.json.gz"]


def test_validation_does_not_disturb_training(pool, tokens, tmp_path):
    """The same losses with and without, also where parameters are gathered late."""
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    losses = {}
    for name, overrides in {
        "never": ["training.eval_interval=0"],
        "often": ["training.eval_interval=1"],
        "often, overlapped": ["training.eval_interval=1", *overlap],
    }.items():
        config = configure("tiny_dense", tokens, "training.train_iters=4", *overrides)
        records = attempt(pool, 2, config, tmp_path / name)
        losses[name] = [record["lm_loss"] for record in records]
        validated = [record["validation_loss"] for record in records if "validation_loss" in record]
        losses[f"{name}, validation"] = validated
    assert losses["never"] == losses["often"]
    assert losses["often, overlapped"] == pytest.approx(losses["often"], rel=1e-6)
    assert losses["often, overlapped, validation"] == pytest.approx(losses["often, validation"], rel=1e-6)
    assert losses["never, validation"] == losses["often, validation"][-1:]


def test_starts_from_another_runs_weights(finished_run, pool, tokens, tokenizer, tmp_path):
    overrides = [f"checkpoint.load={finished_run}", "training.train_iters=1", "optim.lr_warmup_iters=0"]
    config = configure("tiny_dense", tokens, *overrides)
    records = attempt(pool, 1, config, tmp_path / "run")
    assert records[0]["iteration"] == 1
    assert records[0]["consumed_samples"] == 4
    fresh = attempt(pool, 1, configure("tiny_dense", tokens, *overrides[1:]), tmp_path / "fresh")
    assert records[0]["lm_loss"] < fresh[0]["lm_loss"] - 0.05


def test_bf16_keeps_fp32_main_weights(pool, tokens, tmp_path):
    config = configure("tiny_dense", tokens, "precision.dtype=bf16", "training.train_iters=5")
    records = attempt(pool, 2, config, tmp_path / "bf16")
    exact = attempt(pool, 2, configure("tiny_dense", tokens, "training.train_iters=5"), tmp_path / "fp32")
    for a, b in zip(records, exact, strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=5e-3)
    from megatron_qwen.checkpoint.read import CheckpointReader

    tensors = CheckpointReader(iteration_dir(tmp_path / "bf16" / "checkpoints", 5)).tensors()
    kinds = {name: str(info.dtype) for name, info in tensors.items()}
    assert kinds["decoder.final_layernorm.weight"] == "torch.bfloat16"
    assert kinds["optimizer.state.param.decoder.final_layernorm.weight"] == "torch.float32"
    assert kinds["optimizer.state.exp_avg.decoder.final_layernorm.weight"] == "torch.float32"


def test_steps_that_are_done_again_are_kept_apart(finished_run, pool, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    config = resolve(str(tmp_path / "run" / "run.yaml"), ["training.train_iters=2"], RECIPES)
    assert len(attempt(pool, 1, config, tmp_path / "run")) == 2
    assert (tmp_path / "run" / "metrics.superseded.jsonl").read_text() == before


def test_what_is_training_data_does_not_depend_on_validating(tokens):
    config = configure("tiny_dense", tokens)
    readers = [TrainingData(config.with_section("training", eval_iters=iters)).at(0) for iters in (2, 0)]
    assert readers[0].data.sources["data"].stop == readers[1].data.sources["data"].stop
    assert (readers[0][5].tokens == readers[1][5].tokens).all()


def test_wandb_that_is_not_installed_is_one_message(tokens, tmp_path):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    words = [f"data.path={tokens}", "metrics.wandb_project=p", "--run-dir", tmp_path / "run"]
    done = run("launch.train", "tiny_dense", *words)
    assert done.returncode == 2, done.stderr
    assert "metrics.wandb_project = p: needs the wandb package" in done.stderr
    assert "Traceback" not in done.stderr
