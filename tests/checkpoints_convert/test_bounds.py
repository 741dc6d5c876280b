"""Memory and open files do not grow with the model, and are what was predicted."""

import contextlib
import json
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_qwen.config.run import Architecture
from megatron_qwen.config.sections import ModelConfig, RopeConfig
from megatron_qwen.hf.config import hf_config
from megatron_qwen.hf.mapping import hf_tensors
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import command, environment
from tests.tiers import cases

# Beside what Python and torch keep open, the files of two workers.
MOST_FILES = 40


@dataclass(frozen=True)
class Watched:
    """What a process needed."""

    answer: dict[str, Any]
    peak_bytes: int
    open_files: int


def watch(*words: object) -> Watched:
    """Runs ``mq convert`` and watches it."""
    process = subprocess.Popen(
        command("checkpoints_convert.convert", *words, "--json"), stdout=subprocess.PIPE, env=environment()
    )
    most = peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            most = max(most, sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir()))
            # The program's own high-water mark: what wait4 tells counts this process's at the fork as well.
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        time.sleep(0.002)
    assert process.returncode == 0
    assert process.stdout is not None
    return Watched(json.loads(process.stdout.read()), peak, most)


def write_model(model: ModelConfig, directory: Path) -> Path:
    directory.mkdir()
    content = hf_config(Architecture(model=model, rope=RopeConfig()), eos_token_id=0, bos_token_id=0, dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(content))
    tensors = {item.name: torch.randn(item.shape).to(torch.bfloat16) for item in hf_tensors(model)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def scaled(**changes: Any) -> ModelConfig:
    """Qwen2-57B-A14B with all its 28 layers of 64 experts, narrow."""
    model = RECIPES["qwen2_57b_a14b"]().model
    narrow = {"hidden_size": 112, "num_attention_heads": 7, "num_query_groups": 1, "kv_channels": 16}
    widths = {"ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 80, "vocab_size": 2000}
    return replace(model, **{**narrow, **widths, **changes})


@pytest.mark.parametrize("width", cases([40], [240]))
def test_experts_of_57b(width, tmp_path):
    hf = write_model(scaled(moe_ffn_hidden_size=width), tmp_path / "hf")
    there = watch("from-hf", hf, tmp_path / "start", "--max-shard-size", "3MB", "--workers", "2")
    back = watch("to-hf", tmp_path / "start", tmp_path / "back", "--max-shard-size", "3MB", "--workers", "2")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > (10 if width == 40 else 60)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    for name, found in (("from-hf", there), ("to-hf", back)):
        size, predicted = found.answer["weight_bytes"], found.answer["predicted_peak_memory_bytes"]
        print(
            f"{name} of {size / 1e6:.0f} MB in 1,792 experts: peak {found.peak_bytes / 2**20:.0f} MiB, predicted "
            f"{predicted / 2**20:.0f} MiB, {found.open_files} open files"
        )
        assert found.peak_bytes <= predicted
        assert 0 < found.open_files <= MOST_FILES


def test_a_tensor_larger_than_the_memory_of_a_conversion(tmp_path):
    """Vocabulary matrices of 460 MB each: memory stays what it is for small ones."""
    model = replace(
        RECIPES["tiny_dense"]().model, vocab_size=900_000, hidden_size=256, num_attention_heads=4, kv_channels=16
    )
    hf = write_model(model, tmp_path / "hf")
    for words in (("from-hf", hf, tmp_path / "start"), ("to-hf", tmp_path / "start", tmp_path / "back")):
        found = watch(*words, "--workers", "2")
        assert found.answer["weight_bytes"] > 900_000_000
        print(f"{words[0]}: peak {found.peak_bytes / 2**20:.0f} MiB of {found.answer['weight_bytes'] / 2**20:.0f} MiB")
        assert found.peak_bytes <= found.answer["predicted_peak_memory_bytes"] < 1.1e9
