"""``mq bench gpu_step``: training steps of Qwen2.5 shapes on one GPU, against its peak and against one another."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from megatron_qwen.errors import ConfigError, Problem
from tools.dev.benchmarks.gpu_step_worker import Case, Measured
from tools.dev.benchmarks.real_text import write_corpus
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit

# The best published on one GPU of this kind is 57.8 % (KempnerForge, Llama-3 8B, 1 x H200, batch 4, full recompute).
LEAST_MFU, LEAST_FP8_GAIN, LARGEST_LOSS_GAP = 0.60, 1.3, 1e-3
# Moments in bf16 and main weights as remainders: 7.6e9 parameters with 12 bytes each of them leave no room else.
_PRECISION_AWARE = (
    "precision.use_precision_aware_optimizer=true",
    "precision.exp_avg_dtype=bf16",
    "precision.exp_avg_sq_dtype=bf16",
)
_LARGEST = "qwen2_5_7b"
_LOSS_STEPS, _LOSS_BATCH, _HELD_OUT, _LARGEST_FP8_GAP = 200, 2, 64, 0.005
# What a model of this size survives at so few tokens a step: at 3e-4 after twenty steps of warm-up the loss rose again.
# Decayed to a tenth, so that the last steps wander less; two runs in bf16 still differ.
_SLOW = ("optim.learning_rate=4e-5", "optim.min_learning_rate=4e-6", "optim.lr_warmup_iters=50")
_END = 256  # after a document; bytes are 0 to 255
# Sequences at once, and of a step.
_BATCHES = {"qwen2_5_0_5b": (4, 16), "qwen2_5_1_5b": (2, 16), _LARGEST: (2, 32)}


def case_of(recipe: str, *, data: Path, backend: str = "te", fp8: str | None = None, steps: int = 6) -> Case:
    """A shape at a batch that fits one GPU of 141 GB."""
    return Case(
        recipe,
        backend,
        fp8,
        *_BATCHES[recipe],
        steps=steps,
        data=str(data),
        overrides=_PRECISION_AWARE if recipe == _LARGEST else (),
    )


def run_case(case: Case) -> Measured:
    """Measures in a process of its own, so that no case meets another's memory.

    Raises:
        ConfigError: the process failed; with the end of what it said.
    """
    command = [sys.executable, "-P", "-m", "tools.dev.benchmarks.gpu_step_worker", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(Problem(case.recipe, case.backend, f"failed: {done.stderr[-3000:]}"))
    measured = Measured(**json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{case.recipe} {case.backend} {case.fp8 or 'bf16'}: {measured.tokens_per_second:,.0f} tokens/s, "
        f"{measured.tflops:.1f} TFLOP/s, {measured.peak_gib:.1f} GiB, loss {measured.losses[-1]:.4f}",
        file=sys.stderr,
        flush=True,
    )
    return measured


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Every shape in bf16 and in FP8, and the two smaller ones with the torch backend.

    Args:
        rounds: steps of a case that count.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = text_tokens(Path(folder) / "tokens")
        return list(_rows(data, steps=rounds))


def _rows(data: Path, *, steps: int) -> Iterator[BenchmarkRow]:
    for recipe in _BATCHES:
        case, large = case_of(recipe, data=data, steps=steps), recipe == _LARGEST
        half = run_case(case)
        if half.mfu is not None:
            name = f"{recipe} bf16, model FLOP/s as a share of the peak"
            yield _row(name, half.mfu, LEAST_MFU, half, unit="", peer="limit", required=1.0 if large else 0.0)
        eight = run_case(replace(case, fp8="tensorwise"))
        yield _speeds(f"{recipe} FP8 tensorwise", eight, half, peer="bf16", required=LEAST_FP8_GAIN if large else 0.0)
        if large:
            yield from _losses(case)
            continue
        plain = run_case(replace(case, backend="torch"))
        yield _speeds(f"{recipe} bf16, te", half, plain, peer="torch backend", required=1.0)
        gap = max(abs(half.losses[0] - plain.losses[0]), 1e-9)
        name = f"{recipe}, gap of the first losses of te and torch"
        yield against_limit(name, [gap], limit=LARGEST_LOSS_GAP, unit="nats", conditions=_conditions(half))


def loss_case(case: Case, *, fp8: str | None) -> Case:
    """200 steps of a case, and then the loss of sequences that it has not seen."""
    return replace(
        case,
        fp8=fp8,
        micro_batch_size=1,
        global_batch_size=_LOSS_BATCH,
        steps=_LOSS_STEPS - case.warm_up,
        validation=_HELD_OUT,
        overrides=(*case.overrides, *_SLOW),
    )


def _losses(case: Case) -> Iterator[BenchmarkRow]:
    """Loss after 200 steps in FP8 against bf16, and of a second bf16 run: by so much two equal runs differ."""
    half, again, eight = (run_case(loss_case(case, fp8=fp8)) for fp8 in (None, None, "tensorwise"))
    yield _loss_gap(f"{case.recipe}, FP8 tensorwise", eight, half, required=1.0)
    yield _loss_gap(f"{case.recipe}, bf16 once more", again, half, required=0.0)


def _loss_gap(name: str, measured: Measured, half: Measured, *, required: float) -> BenchmarkRow:
    """Gap of the mean loss of the last twenty steps."""
    ours, theirs = (statistics.fmean(one.losses[-20:]) for one in (measured, half))
    held_out = f"{_HELD_OUT} sequences held out {measured.validation_loss:.4f} and {half.validation_loss:.4f}"
    conditions = (
        f"{half.device}, last twenty steps {ours:.4f} and {theirs:.4f} in bf16, {held_out}; "
        f"{_LOSS_BATCH} sequences of 4096 a step"
    )
    gap = max(abs(ours / theirs - 1), 1e-9)
    name = f"{name}: relative gap of the loss after {_LOSS_STEPS} steps"
    return replace(
        against_limit(name, [gap], limit=_LARGEST_FP8_GAP, unit="", conditions=conditions), required=required
    )


def _speeds(name: str, ours: Measured, theirs: Measured, *, peer: str, required: float) -> BenchmarkRow:
    unit = "tokens/s"
    return _row(name, ours.tokens_per_second, theirs.tokens_per_second, ours, unit=unit, peer=peer, required=required)


def _row(
    name: str, value: float, against: float, measured: Measured, *, unit: str, peer: str, required: float
) -> BenchmarkRow:
    ratio = value / against
    return BenchmarkRow(name, value, against, unit, peer, ratio, ratio, ratio, required, _conditions(measured))


def _conditions(measured: Measured) -> str:
    return f"{measured.device}, sequence 4096, {len(measured.seconds)} steps, {measured.peak_gib:.1f} GiB"


def text_tokens(prefix: Path, *, megabytes: int = 4) -> Path:
    """The bytes of this machine's sources as tokens: real text, where no tokenizer can be fetched."""
    from megatron_qwen.data.token_files.token_file import TokenFileWriter

    text = prefix.with_suffix(".jsonl")
    write_corpus(text, megabytes=megabytes)
    with TokenFileWriter(prefix, vocab_size=151_665) as writer, text.open(encoding="utf-8") as lines:
        for line in lines:
            writer.add([*json.loads(line)["text"].encode(), _END])
    return prefix
