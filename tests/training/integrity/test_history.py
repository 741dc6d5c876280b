"""The steps before a resume as metrics.jsonl has them, and the decisions that depend on them."""

import json

from megatron_qwen.training.integrity.history import recent


def test_the_last_records_up_to_an_iteration(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": number, "lm_loss": 1.0 / number}) for number in range(1, 101)]
    metrics.write_text("\n".join(lines) + '\n{"iteration": 101, "lm')
    assert [record["iteration"] for record in recent(metrics, last=60, count=3)] == [58, 59, 60]
    assert [record["iteration"] for record in recent(metrics, last=2, count=500)] == [1, 2]
    assert recent(metrics, last=0, count=5) == []
    assert recent(tmp_path / "none", last=9, count=5) == []


def test_a_line_that_the_window_cuts_is_left_out(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    long = "x" * 3000
    metrics.write_text("".join(json.dumps({"iteration": number, "text": long}) + "\n" for number in range(1, 50)))
    assert [record["iteration"] for record in recent(metrics, last=49, count=1)] == [49]
