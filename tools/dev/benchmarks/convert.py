"""``mq bench convert``: a 7B-shaped checkpoint to Hugging Face and back, against cp of the same bytes."""

import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import UserError
from megatron_qwen.recipes.registry import RECIPES
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit

ROOT = Path(__file__).resolve().parents[3]
_RECIPE = "qwen2_5_7b"
_COPIES = 3.3  # source, result and a copy at a time, and some room
_SHARD_BYTES = 4_000_000_000
# Far below the 15 GB of the model, so that a conversion which holds it fails here.
_MEMORY_LIMIT_BYTES = 2 << 30
# Of cp's speed: a conversion also hashes every byte, and cp does not. Chosen by hand; benchmarks/results has 0.91 and
# 1.10.
_REQUIRED = 0.6


@dataclass(frozen=True)
class Timed:
    """A command that ended well.

    Args:
        seconds: wall-clock time until its bytes were on the disk.
        peak_bytes: its largest resident memory.
    """

    seconds: float
    peak_bytes: int


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Rows for both directions, each against cp in the same round, and for the memory of each.

    The directories are in the temporary folder (TMPDIR) and are removed. Where the disk has no room for the whole
    model, it has fewer layers.

    Args:
        rounds: turns of cp, from-hf, cp, to-hf.
    """
    with tempfile.TemporaryDirectory(prefix="mq-bench-") as folder:
        root = Path(folder)
        model = _fitting(RECIPES[_RECIPE]().model, shutil.disk_usage(root).free)
        size = write_directory(model, root / "hf")
        cold = can_drop_caches()
        results: dict[str, list[Timed]] = {"from-hf": [], "cp hf": [], "to-hf": [], "cp checkpoint": []}
        for _ in range(rounds):
            for name, command, made in _round(root):
                results[name].append(timed(command, cold=cold))
                if made is not None:
                    shutil.rmtree(made)
            _require_same(root / "hf", root / "back")
            shutil.rmtree(root / "checkpoint")
            shutil.rmtree(root / "back")
    conditions = (
        f"{model.num_layers} layers of {_RECIPE} in bf16, {size / 1e9:.1f} GB, {rounds} rounds, "
        f"{os.cpu_count()} cores; page cache {'dropped before every command' if cold else 'as it came'}; "
        "every command until its bytes are on the disk"
    )
    rows = []
    for name, peer in (("from-hf", "cp hf"), ("to-hf", "cp checkpoint")):
        rows.append(_against_cp(name, results[name], results[peer], size=size, conditions=conditions))
        peaks = [item.peak_bytes / 2**30 for item in results[name]]
        limit = _MEMORY_LIMIT_BYTES / 2**30
        rows.append(against_limit(f"{name}, peak memory", peaks, limit=limit, unit="GiB", conditions=conditions))
    return rows


def _round(root: Path) -> list[tuple[str, list[str], Path | None]]:
    """The commands of a round in turn, and what to remove after each."""
    convert = [sys.executable, "-P", "-m", "checkpoints_convert.convert"]
    hf, checkpoint, copy, back = (str(root / name) for name in ("hf", "checkpoint", "copy", "back"))
    return [
        ("cp hf", ["cp", "-r", hf, copy], root / "copy"),
        ("from-hf", [*convert, "from-hf", hf, checkpoint, "--json"], None),
        ("cp checkpoint", ["cp", "-r", checkpoint, copy], root / "copy"),
        ("to-hf", [*convert, "to-hf", checkpoint, back, "--json"], None),
    ]


def timed(command: Sequence[str], *, cold: bool) -> Timed:
    """Runs a command until its bytes are on the disk; ``cold`` empties the page cache first."""
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise UserError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    os.sync()
    return Timed(time.perf_counter() - started, usage.ru_maxrss * 1024)


def _against_cp(name: str, ours: Sequence[Timed], peer: Sequence[Timed], *, size: int, conditions: str) -> BenchmarkRow:
    ratios = [theirs.seconds / own.seconds for own, theirs in zip(ours, peer, strict=True)]

    def rate(items: Sequence[Timed]) -> float:
        return statistics.median(size / item.seconds / 1e9 for item in items)

    middle = statistics.median(ratios)
    return BenchmarkRow(
        name, rate(ours), rate(peer), "GB/s", "cp", middle, min(ratios), max(ratios), _REQUIRED, conditions
    )


def can_drop_caches() -> bool:
    """Whether this process may empty the page cache."""
    return os.access("/proc/sys/vm/drop_caches", os.W_OK) and os.geteuid() == 0


def _fitting(model: ModelConfig, free: int) -> ModelConfig:
    """The model with as many layers as the disk has room for."""
    for layers in range(model.num_layers, 0, -1):
        smaller = replace(model, num_layers=layers)
        if sum(size for _, _, size in _tensors(smaller)) * _COPIES < free:
            return smaller
    raise UserError("the temporary folder has no room for a single layer; set TMPDIR to a larger disk.")


def _tensors(model: ModelConfig) -> list[tuple[str, list[int], int]]:
    """Name, shape and bytes of every tensor of the Hugging Face model, written out by hand."""
    h, ffn, kv = model.hidden_size, model.ffn_hidden_size, model.num_query_groups * model.head_dim
    q = model.num_attention_heads * model.head_dim
    layer = {
        "self_attn.q_proj.weight": [q, h],
        "self_attn.q_proj.bias": [q],
        "self_attn.k_proj.weight": [kv, h],
        "self_attn.k_proj.bias": [kv],
        "self_attn.v_proj.weight": [kv, h],
        "self_attn.v_proj.bias": [kv],
        "self_attn.o_proj.weight": [h, q],
        "mlp.gate_proj.weight": [ffn, h],
        "mlp.up_proj.weight": [ffn, h],
        "mlp.down_proj.weight": [h, ffn],
        "input_layernorm.weight": [h],
        "post_attention_layernorm.weight": [h],
    }
    shapes = {"model.embed_tokens.weight": [model.vocab_size, h]}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(model.num_layers) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": [h], "lm_head.weight": [model.vocab_size, h]}
    return [(name, shape, 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)) for name, shape in shapes.items()]


def write_directory(model: ModelConfig, directory: Path, *, noise: bytes | None = None) -> int:
    """Writes a Hugging Face directory of bf16 weights; its bytes of weights.

    Args:
        model: its shape.
        directory: where.
        noise: bytes that the weights repeat; None for random bits, some of which are no numbers.
    """
    directory.mkdir()
    groups: list[list[tuple[str, list[int], int]]] = [[]]
    for tensor in _tensors(model):
        if sum(size for _, _, size in groups[-1]) + tensor[2] > _SHARD_BYTES and groups[-1]:
            groups.append([])
        groups[-1].append(tensor)
    weight_map = {}
    noise = noise or os.urandom(1 << 26)
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update(dict.fromkeys((name for name, _, _ in group), file))
        _write_shard(directory / file, sorted(group), noise)
    content = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(json.dumps(_config(model)))
    return sum(size for _, _, size in _tensors(model))


def _write_shard(path: Path, tensors: Sequence[tuple[str, list[int], int]], noise: bytes) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, size in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at > 0:
            at -= file.write(memoryview(noise)[: min(at, len(noise))])


def _config(model: ModelConfig) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": RECIPES[_RECIPE]().rope.base,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _require_same(original: Path, back: Path) -> None:
    """The benchmark is worth nothing if the bytes are not the same."""
    for path in sorted(original.glob("*.safetensors")):
        if subprocess.run(["cmp", path, back / path.name], check=False).returncode:
            raise UserError(f"{back / path.name} differs from {path}")
