"""Records of steps: in metrics.jsonl and in TensorBoard's events."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
