"""What metrics.jsonl, TensorBoard and the console say is what was computed, in the unit that the name says."""

import io
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_qwen.metrics.console import ProgressLine
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.training.callbacks import metrics
from megatron_qwen.training.callbacks.metrics import Metrics
from megatron_qwen.training.progress import TrainingProgress
from megatron_qwen.training.step import StepResult
from megatron_qwen.training.step_record import StepRecord
from tests.training.cases import RATES, config_of, in_micro_batches, twin_of
from tests.training.reference import batch


def test_a_line_a_step_with_what_transformers_computes(reported, starts, masked_documents):
    twin = twin_of("tiny_dense", starts["tiny_dense"])
    config = config_of("tiny_dense", masked_documents)
    for number, (record, rate) in enumerate(zip(reported.records, RATES, strict=True), 1):
        loss, norm = twin.step(in_micro_batches(batch(config, masked_documents, step=number)), rate=rate)
        assert record["iteration"] == number
        assert record["lm_loss"] == pytest.approx(loss, rel=2e-6)
        assert record["grad_norm"] == pytest.approx(norm, rel=2e-5)
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert record["consumed_samples"] == 8 * number
        assert record["consumed_tokens"] == 512 * number
        assert record["skipped"] is False


def test_tensorboard_has_every_number_of_the_lines(reported):
    events = EventAccumulator(str(reported.path / "tensorboard"))
    events.Reload()
    names = {
        name
        for record in reported.records
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "iteration"
    }
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        expected = [(record["iteration"], record[name]) for record in reported.records if name in record]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


def shown(monkeypatch, config, *, seconds=0.5, ranks=4, device="NVIDIA H100 80GB HBM3", **result):
    """The record and the console line of one step of given duration on given devices."""
    monkeypatch.setattr(metrics, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: ranks))
    monkeypatch.setattr(metrics.device, "device_name", lambda: device)
    monkeypatch.setattr(metrics.device, "peak_memory_bytes", lambda: 3 * 2**29)
    progress = TrainingProgress(iteration=7, schedule_iteration=6, consumed_samples=56, consumed_tokens=3584)
    trainer = SimpleNamespace(components=SimpleNamespace(config=config, progress=progress))
    done = StepResult(**{"loss": 2.5, "grad_norm": 0.75, "weight": 500, "tokens": 512, "skipped": False, **result})
    record = StepRecord(7, done, 3e-4, 8, seconds, 0.125, "text", config, {"validation_loss": 2.625})
    kept, console = Kept(), io.StringIO()
    callback = Metrics([kept], attempt=2, console=ProgressLine(console))
    callback.before_training(trainer)
    callback.after_step(trainer, record)
    return kept.records[0], console.getvalue()


# 6 FLOPs for each of the 169,024 parameters that a token meets (tests/estimate/test_flops.py counts them), and
# attention: 12 x 4 layers x 4 heads x 16 channels x 64 positions.
TINY_FLOPS = 6 * 169_024 + 196_608


def test_speed_flops_mfu_and_memory_of_a_step(monkeypatch):
    """Eight sequences of 64 tokens in half a second on four devices: 1,024 tokens/s, 256 each."""
    config = RECIPES["tiny_dense"]().with_section("precision", dtype="bf16")
    record, line = shown(monkeypatch, config)
    assert (record["tokens_per_second"], record["tokens_per_second_per_device"]) == (1024, 256)
    tflops = 256 * TINY_FLOPS / 1e12
    assert record["model_tflops_per_device"] == pytest.approx(tflops, rel=1e-12)
    # Dense bf16 of an H100 SXM by its data sheet: 989.4 TFLOP/s.
    assert record["mfu"] == pytest.approx(tflops / 989.4, rel=1e-12)
    assert record["peak_memory_gib"] == 1.5
    assert (record["step_time_s"], record["data_wait_s"]) == (0.5, 0.125)
    assert (record["seq_length"], record["global_batch_size"], record["attempt"]) == (64, 8, 2)
    assert line == (
        "step 7/10  loss 2.5000  grad 0.75  lr 3.00e-04  1,024 tokens/s  MFU 0.0%  2 s left  | validation loss 2.6250\n"
    )


def test_padding_is_not_counted(monkeypatch):
    """Of 512 positions 128 hold tokens: a quarter of the speed and of the FLOPs."""
    config = RECIPES["tiny_dense"]().with_section("precision", dtype="bf16")
    full, padded = (shown(monkeypatch, config, tokens=tokens)[0] for tokens in (512, 128))
    for name in ("tokens_per_second", "tokens_per_second_per_device", "model_tflops_per_device", "mfu"):
        assert padded[name] == full[name] / 4


def test_a_device_or_format_whose_peak_is_not_known_has_no_mfu(monkeypatch):
    bf16 = RECIPES["tiny_dense"]().with_section("precision", dtype="bf16")
    assert shown(monkeypatch, bf16, device="CPU")[0]["mfu"] is None
    fp32, line = shown(monkeypatch, RECIPES["tiny_dense"]())
    assert fp32["mfu"] is None
    assert "MFU" not in line


def test_a_skipped_step_is_said_to_be_one(monkeypatch):
    record, line = shown(monkeypatch, RECIPES["tiny_dense"](), loss=float("nan"), skipped=True)
    assert record["skipped"] is True
    assert "loss nan" in line
    assert "SKIPPED (not finite)" in line


def test_metrics_of_the_objective_are_fields_of_the_record(monkeypatch):
    record, _ = shown(monkeypatch, RECIPES["tiny_dense"](), metrics={"log_prob": -1.5})
    assert record["log_prob"] == -1.5
