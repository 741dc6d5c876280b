"""``mq bench quantize``: releases of a 7B-shaped checkpoint, rounded to nearest, against to-hf of the same one."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy

from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.recipes.registry import RECIPES
from tools.dev.benchmarks.convert import ROOT, Timed, can_drop_caches, timed, write_directory
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit, against_peer

_RECIPE = "qwen2_5_7b"
_LAYERS = 4  # of 28; the vocabulary is as much smaller, so that embeddings have their part
_NOISE_VALUES = 1 << 24
_STD = 0.02
_SHARD = "500MB"  # several files, so that all workers have one
# Of the rate of to-hf, or of what the encoder does to rows in memory, whichever is less. to-hf casts, which is as fast
# as memory; an encoder computes some ten operations for each weight, once for each tensor that is made of it.
_REQUIRED = 0.5
_MEMORY_LIMIT_BYTES = 3 << 29
_ENCODED_ROWS = 512


def run(*, rounds: int, layers: int = _LAYERS) -> list[BenchmarkRow]:
    """Rows for every format, each against to-hf in the same round, and for its memory.

    The directories are in the temporary folder (TMPDIR) and are removed.

    Args:
        rounds: turns of to-hf and all formats.
        layers: of the model.
    """
    whole = RECIPES[_RECIPE]().model
    model = replace(whole, num_layers=layers, vocab_size=whole.vocab_size * layers // whole.num_layers // 128 * 128)
    cold = can_drop_caches()
    encoders = _encoder_rates(model)
    taken: dict[str, list[Timed]] = {name: [] for name in ("to-hf", *encoders)}
    with tempfile.TemporaryDirectory(prefix="mq-bench-") as folder:
        root = Path(folder)
        size = write_directory(model, root / "hf", noise=bf16_noise())
        timed(_words("from-hf", root / "hf", root / "checkpoint"), cold=False)
        shutil.rmtree(root / "hf")
        for _ in range(rounds):
            for name, found in taken.items():
                words = ("to-hf",) if name == "to-hf" else ("quantize", "--format", name, "--method", "nearest")
                command = _words(*words, root / "checkpoint", root / "out", "--max-shard-size", _SHARD)
                found.append(timed(command, cold=cold))
                shutil.rmtree(root / "out")
    conditions = (
        f"{model.num_layers} layers of {_RECIPE} with {model.vocab_size:,} tokens, {size / 1e9:.1f} GB of bf16 in a "
        f"checkpoint, {rounds} rounds, {os.cpu_count()} cores; page cache "
        f"{'dropped before every command' if cold else 'as it came'}; until the bytes are on the disk"
    )
    rows = []
    for name, encoder in encoders.items():
        rows.append(_against_export(name, taken[name], taken["to-hf"], size=size, encoder=encoder, told=conditions))
        peaks = [item.peak_bytes / 2**30 for item in taken[name]]
        limit = _MEMORY_LIMIT_BYTES / 2**30
        rows.append(against_limit(f"{name}, peak memory", peaks, limit=limit, unit="GiB", conditions=conditions))
    return rows


def _words(*words: object) -> list[str]:
    return [sys.executable, "-P", "-m", "checkpoints_convert.convert", *map(str, words), "--json"]


def bf16_noise() -> bytes:
    """Values as weights have them: quantizing random bits would meet infinities."""
    values = numpy.random.default_rng(1).standard_normal(_NOISE_VALUES, dtype=numpy.float32) * numpy.float32(_STD)
    # The upper half of a float32 is a bf16.
    return bytes((values.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes())


def _encoder_rates(model: ModelConfig) -> dict[str, float]:
    """GB/s of bf16 rows in memory that become all tensors of a format, by format."""
    program = [sys.executable, "-P", "-m", "checkpoints_convert.quantize.encoder_rate"]
    words = [*program, str(_ENCODED_ROWS), str(model.hidden_size)]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return {name: rate / 1e9 for name, rate in json.loads(done.stdout).items()}


def _against_export(
    name: str, ours: Sequence[Timed], export: Sequence[Timed], *, size: int, encoder: float, told: str
) -> BenchmarkRow:
    def rate(item: Timed) -> float:
        return size / item.seconds / 1e9

    peers = [min(rate(item), encoder) for item in export]
    middle = statistics.median(peers)
    return against_peer(
        name,
        [rate(own) / peer for own, peer in zip(ours, peers, strict=True)],
        ours=statistics.median(map(rate, ours)),
        against=middle,
        unit="GB/s of bf16",
        peer="its encoder in memory" if middle == encoder else "to-hf",
        required=_REQUIRED,
        conditions=f"{told}; the encoder alone: {encoder:.2f} GB/s",
    )
