"""Memory of a release does not grow with the model, and is what was predicted."""

from dataclasses import replace

import pytest

from megatron_qwen.recipes.registry import RECIPES
from tests.checkpoints_convert.test_bounds import watch, write_model
from tests.tiers import cases, count

LIMIT = 3 << 29  # 1.5 GiB


@pytest.mark.parametrize("name", cases(["gptq-int8"], ["awq-int4", "w4a16", "w8a8", "fp8", "fp8-block"]))
def test_a_wide_feed_forward(name, tmp_path):
    """As wide as 72B's. Thorough: weights of 130 million values, half of its largest, 520 MB each in float32."""
    model = RECIPES["tiny_dense"]().model
    heads = count(quick=10, thorough=34)
    model = replace(model, num_layers=1, hidden_size=128 * heads, ffn_hidden_size=29_952, num_attention_heads=heads)
    model = replace(model, num_query_groups=2, kv_channels=128, vocab_size=512)
    hf = write_model(model, tmp_path / "hf")
    options = ("--format", name, "--method", "nearest", "--max-shard-size", "100MB", "--workers", "2")
    found = watch("quantize", hf, tmp_path / "out", *options)
    predicted = found.answer["predicted_peak_memory_bytes"]
    print(
        f"{name}: peak {found.peak_bytes / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f} MiB, "
        f"{found.answer['weight_bytes'] / 2**20:.0f} MiB written in {found.answer['seconds']:.1f} s"
    )
    assert found.peak_bytes <= predicted <= LIMIT
    assert found.open_files <= 40
