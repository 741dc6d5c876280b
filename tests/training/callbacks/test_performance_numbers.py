"""The card of two attempts on a clock of the test: every second by hand, and speed, MFU and memory from them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_qwen.config.run import RunConfig
from megatron_qwen.rundir import RunDirectory
from tests.training.cases import config_of

BUILD_S, LOAD_S, STEP_S, SAVE_S, VALIDATION_S, WRITE_S, BETWEEN_S = 7.0, 0.25, 1.0, 3.0, 0.5, 0.125, 100.0
# Steps that take longer than STEP_S; the second is skipped.
SLOW = {2: 2.0, 9: 3.0, 10: 2.0}
SKIPPED = 2
FIRST, LAST = 4, 10
GIB = 2**30
# tiny_dense (tests/estimate/test_flops.py): FLOPs a token with 64 positions.
FLOPS = 6 * 169_024 + 12 * 4 * 64 * 64


def attempt_on_a_clock(config: RunConfig, run_dir: Path, begins: float) -> int:
    """An attempt in which nothing takes time but what moves the clock: building, loading, steps, saves and so on."""
    from dataclasses import replace

    import torch.distributed as dist

    from megatron_qwen import device
    from megatron_qwen.checkpoint.write import CheckpointWriter
    from megatron_qwen.metrics.writers import JsonlWriter
    from megatron_qwen.training import attempt, trainer
    from megatron_qwen.training.callbacks import performance
    from megatron_qwen.training.callbacks.validation import Validation
    from tests.distributed import jobs

    now = [begins]
    clock = SimpleNamespace(time=lambda: now[0], perf_counter=lambda: now[0])
    state: dict[str, Any] = {}

    def taking(seconds: float, work: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            now[0] += seconds
            return work(*arguments, **named)

        return timed

    def build(own: RunConfig) -> Any:
        components = state["components"] = taking(BUILD_S, real_build)(own)
        components.loader.load = taking(LOAD_S, components.loader.load)
        return components

    def step(*arguments: Any, **options: Any) -> Any:
        iteration = state["components"].progress.iteration + 1
        result = taking(SLOW.get(iteration, STEP_S), real_step)(*arguments, **options)
        return replace(result, loss=float("nan"), skipped=True) if iteration == SKIPPED else result

    real_build, real_step = attempt.build_components, trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "time", clock)
        patch.setattr(performance, "time", clock)
        patch.setattr(attempt, "time", clock)
        patch.setattr(attempt, "build_components", build)
        patch.setattr(trainer, "train_step", step)
        patch.setattr(Validation, "measure", taking(VALIDATION_S, Validation.measure))
        patch.setattr(CheckpointWriter, "save", taking(SAVE_S, CheckpointWriter.save))
        patch.setattr(JsonlWriter, "write", taking(WRITE_S, JsonlWriter.write))
        patch.setattr(device, "device_name", lambda: "NVIDIA H100 80GB HBM3")
        # The second rank is the fuller one.
        patch.setattr(device, "peak_memory_bytes", lambda: (2 + dist.get_rank()) * GIB)
        assert jobs.attempt(config, run_dir) == 0
    return 0


@pytest.fixture(scope="module")
def run(pool, documents, tmp_path_factory):
    """Four steps, and six more in a second attempt; two ranks, bf16, as on H100s."""
    run_dir, begins = tmp_path_factory.mktemp("clock") / "run", 1_000_000.0
    for last in (FIRST, LAST):
        training = {"train_iters": last, "eval_interval": 0, "eval_iters": 1}
        changes = {"precision": {"dtype": "bf16"}, "checkpoint": {"save_interval": 2}}
        config = config_of("tiny_dense", documents, training=training, data={"validation_fraction": 0.1}, **changes)
        RunDirectory(run_dir).claim(config)
        assert pool[2].run(attempt_on_a_clock, config, run_dir, begins) == [0, 0]
        card = json.loads((run_dir / "performance.json").read_text())
        begins = card["attempts"][-1]["started"] + card["attempts"][-1]["wall_s"] + BETWEEN_S
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(card=card, records=records)


def test_every_second_of_an_attempt_is_of_one_kind(run):
    """The save that is due after the skipped second step follows the third."""
    first, second = run.card["attempts"]
    expected = {"startup_s": 7, "steps_s": 3, "skipped_s": 2, "data_wait_s": 1, "save_s": 6, "validation_s": 0.5}
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert first["wall_s"] == pytest.approx(sum(expected.values()) + 4 * WRITE_S)
    expected = {"startup_s": 7, "steps_s": 9, "skipped_s": 0, "data_wait_s": 1.5, "save_s": 9, "validation_s": 0.5}
    assert {name: second[name] for name in expected} == pytest.approx(expected)
    assert second["wall_s"] == pytest.approx(sum(expected.values()) + 6 * WRITE_S)
    assert (first["iteration"], second["resumed_at"], second["iteration"]) == (4, 4, 10)


def test_goodput_is_what_the_clock_says(run):
    expected = {
        "steps_s": 12,
        "steps_done_again_s": 0,
        "steps_skipped_s": 2,
        "data_wait_s": 2.5,
        "save_s": 15,
        "validation_s": 1,
        "evaluation_s": 0,
        "startup_s": 14,
        "between_attempts_s": 100,
        "other_s": 1.25,
    }
    found = dict(run.card["goodput"])
    whole = 20 + 100 + 27.75  # the first attempt, what lies between, the second
    assert found.pop("share") == pytest.approx(12 / whole)
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(whole)


def test_metrics_of_a_step_are_by_the_same_clock(run):
    times = [SLOW.get(iteration, STEP_S) + LOAD_S for iteration in range(1, LAST + 1)]
    assert [record["step_time_s"] for record in run.records] == pytest.approx(times)
    assert [record["data_wait_s"] for record in run.records] == pytest.approx([LOAD_S] * LAST)
    for record, seconds in zip(run.records, times, strict=True):
        assert record["tokens_per_second"] == pytest.approx(8 * 64 / seconds)
        assert record["tokens_per_second_per_device"] == pytest.approx(8 * 64 / seconds / 2)
    assert [record["skipped"] for record in run.records] == [number == SKIPPED for number in range(1, LAST + 1)]


def test_speed_is_the_median_after_the_first_three_steps_of_the_attempt(run):
    """Steps 8, 9 and 10 take 1.25, 3.25 and 2.25 s: 512 tokens in 2.25 s on two devices."""
    speed = 512 / 2.25 / 2
    assert run.card["steps_measured"] == 3
    assert run.card["tokens_per_second_per_device"] == pytest.approx(speed)
    assert run.card["model_flops_per_token"] == FLOPS
    assert run.card["model_tflops_per_device"] == pytest.approx(speed * FLOPS / 1e12)
    assert run.card["mfu"] == pytest.approx(speed * FLOPS / 989.4e12)
    assert run.card["peak_tflops"] == 989.4


def test_memory_of_the_fullest_rank_by_part(run):
    """Scalars with 320 rows padded to 384; bf16 weights, fp32 gradients, 12 bytes of optimizer over two ranks."""
    scalars = 2 * 384 * 64 + 4 * (12_288 + 128 + 24_576 + 128) + 64
    memory = dict(run.card["memory"])
    assert memory.pop("rank") == 1
    assert memory.pop("peak_gib") == 3.0
    # Buffers are padded to what the ranks share evenly.
    assert memory["weights_gib"] * GIB == pytest.approx(2 * scalars, rel=5e-3)
    assert memory["gradients_gib"] * GIB == pytest.approx(4 * scalars, rel=5e-3)
    assert memory["optimizer_gib"] * GIB == pytest.approx(12 * scalars / 2, rel=5e-3)
    assert sum(memory.values()) == pytest.approx(3.0)
