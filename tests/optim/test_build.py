"""The optimizer of bf16 runs."""

import pytest

from megatron_qwen.checkpoint.paths import iteration_dir
from tests.training.attempts import attempt, configure


def test_bf16_keeps_fp32_main_weights(pool, tokens, tmp_path):
    config = configure("tiny_dense", tokens, "precision.dtype=bf16", "training.train_iters=5")
    records = attempt(pool, 2, config, tmp_path / "bf16")
    exact = attempt(pool, 2, configure("tiny_dense", tokens, "training.train_iters=5"), tmp_path / "fp32")
    for a, b in zip(records, exact, strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=5e-3)
    from megatron_qwen.checkpoint.read import CheckpointReader

    tensors = CheckpointReader(iteration_dir(tmp_path / "bf16" / "checkpoints", 5)).tensors()
    kinds = {name: str(info.dtype) for name, info in tensors.items()}
    assert kinds["decoder.final_layernorm.weight"] == "torch.bfloat16"
    assert kinds["optimizer.state.param.decoder.final_layernorm.weight"] == "torch.float32"
    assert kinds["optimizer.state.exp_avg.decoder.final_layernorm.weight"] == "torch.float32"
