"""performance.json of real runs: it agrees with metrics.jsonl, and goes on over attempts."""

import json

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.estimate.memory import memory_per_stage
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.distributed import jobs
from tools.report import write_report
from tools.report_card import card_html


@pytest.fixture(scope="module")
def card(pool, tokens, tmp_path_factory):
    """Two attempts of a mixture on two ranks; the second goes on where the first ended."""
    run_dir = tmp_path_factory.mktemp("card") / "run"
    words = [f"data.path={tokens}", "parallel.expert_model_parallel_size=2", "training.eval_interval=4"]
    for steps in (6, 12):
        config = resolve("tiny_moe", [*words, f"training.train_iters={steps}", "optim.lr_decay_iters=12"], RECIPES)
        RunDirectory(run_dir).claim(config)
        assert pool[2].run(jobs.attempt, config, run_dir) == [0, 0]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return run_dir, config, json.loads((run_dir / "performance.json").read_text()), records


def test_it_agrees_with_the_metrics(card):
    _, config, found, records = card
    steps = sum(record["step_time_s"] - record["data_wait_s"] for record in records)
    assert found["goodput"]["steps_s"] == pytest.approx(steps, rel=1e-3)
    assert found["goodput"]["data_wait_s"] == pytest.approx(sum(record["data_wait_s"] for record in records))
    speeds = sorted(record["tokens_per_second_per_device"] for record in records[9:])
    assert found["tokens_per_second_per_device"] == pytest.approx(speeds[1], rel=1e-6)  # the attempt's first 3 warm up
    flops = training_flops_per_token(config.model, config.data.seq_length)
    assert found["model_flops_per_token"] == flops
    assert found["model_tflops_per_device"] == pytest.approx(speeds[1] * flops / 1e12, rel=1e-6)
    assert (found["mfu"], found["peak"], found["routing"]) == (None, None, "natural")
    assert found["devices"] == 2
    assert found["choices"]["parallel.overlap_grad_reduce"]["value"] is False


def test_attempts_follow_one_another(card):
    _, _, found, _ = card
    first, second = found["attempts"]
    assert (first["resumed_at"], first["iteration"], second["resumed_at"], second["iteration"]) == (0, 6, 6, 12)
    assert first["save_s"] > 0
    assert first["validation_s"] > 0
    assert found["goodput"]["steps_done_again_s"] == 0
    assert 0 < found["goodput"]["share"] < 1


def test_memory_by_part_is_what_the_estimate_counts(card):
    _, config, found, _ = card
    memory = found["memory"]
    expected = memory_per_stage(config, world_size=2)[0]
    for part in ("weights", "gradients", "optimizer"):
        assert memory[f"{part}_gib"] * 2**30 == pytest.approx(getattr(expected, part), rel=0.02)
    assert memory["peak_gib"] > memory["weights_gib"] + memory["gradients_gib"] + memory["optimizer_gib"]


def test_the_report_shows_it(card, tmp_path):
    run_dir, _, found, _ = card
    write_report(run_dir, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for text in (
        "Performance card",
        f"{found['tokens_per_second_per_device']:,.0f}",
        "Where the time went",
        "steps that count",
        "Memory of the fullest rank",
        "no overlap of communication with compute on a CPU",
    ):
        assert text in page
    assert "steps done again" not in page.split('class="legend"')[1]  # there are none


def test_a_gpu_run_that_measured_no_step_has_a_report(card):
    """Preempted after two steps: a peak is known, a speed is not."""
    _, _, found, _ = card
    page = card_html({**found, "peak_tflops": 989.4, "peak": "dense bf16 of one H200, data sheet", "mfu": None})
    assert "not measured; peak 989.4 TFLOP/s: dense bf16 of one H200" in page


def test_a_run_without_a_card_has_a_report(card, tmp_path):
    run_dir, _, _, _ = card
    card_file = run_dir / "performance.json"
    kept = card_file.read_text()
    card_file.write_text("{")
    write_report(run_dir, tmp_path / "report.html")
    card_file.write_text(kept)
    assert "Performance card" not in (tmp_path / "report.html").read_text()
