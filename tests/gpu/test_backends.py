"""On a GPU: both backends train the same model, FP8 stays near bf16, and checkpoints pass between all of them."""

import json
from pathlib import Path

import pytest
import torch

from megatron_qwen.models.te_backend import provider as te_backend
from tests.conftest import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

# Transformer Engine's GEMMs want dimensions that divide by 16, FP8 by 32.
SHAPE = ["model.hidden_size=256", "model.ffn_hidden_size=512", "model.kv_channels=64", "data.seq_length=128"]
STEPS = 10


def needs_te() -> None:
    if reason := te_backend.why_not():
        pytest.skip(f"Transformer Engine cannot run here: {reason}")


def losses(recipe: str, tokens: Path, run_dir: Path, *overrides: str, steps: int = STEPS) -> list[float]:
    words = [
        f"data.path={tokens}",
        *SHAPE,
        f"training.train_iters={steps}",
        f"optim.lr_decay_iters={STEPS}",
        *overrides,
    ]
    done = run("launch.train", recipe, *words, "--run-dir", run_dir, gpu=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["lm_loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe", "tiny_qwen3"])
def test_torch_backend_in_fp32_and_bf16(recipe, tokens, tmp_path):
    exact = losses(recipe, tokens, tmp_path / "fp32", "precision.backend=torch")
    half = losses(recipe, tokens, tmp_path / "bf16", "precision.backend=torch", "precision.dtype=bf16")
    assert exact[-1] < exact[0]
    assert half == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe", "tiny_qwen3"])
def test_te_equals_torch(recipe, tokens, tmp_path):
    needs_te()
    ours = losses(recipe, tokens, tmp_path / "torch", "precision.backend=torch", "precision.dtype=bf16")
    theirs = losses(recipe, tokens, tmp_path / "te", "precision.backend=te", "precision.dtype=bf16")
    assert theirs[0] == pytest.approx(ours[0], abs=1e-3)
    assert theirs == pytest.approx(ours, rel=1e-2)


def test_te_equals_torch_with_independent_sequences(tokens, tmp_path):
    needs_te()
    apart = ["precision.dtype=bf16", "data.reset_attention_mask=true"]
    ours = losses("tiny_dense", tokens, tmp_path / "torch", "precision.backend=torch", *apart)
    theirs = losses("tiny_dense", tokens, tmp_path / "te", "precision.backend=te", *apart)
    assert theirs[0] == pytest.approx(ours[0], abs=1e-3)
    assert theirs == pytest.approx(ours, rel=1e-2)


@pytest.mark.parametrize("fp8", ["tensorwise", "delayed", "blockwise"])
def test_fp8_stays_near_bf16(fp8, tokens, tmp_path):
    needs_te()
    if reason := te_backend.why_not_fp8(fp8):
        pytest.skip(reason)
    half = losses("tiny_dense", tokens, tmp_path / "bf16", "precision.dtype=bf16")
    eight = losses("tiny_dense", tokens, tmp_path / "fp8", "precision.dtype=bf16", f"precision.fp8={fp8}")
    assert eight == pytest.approx(half, rel=3e-2)


def test_fp8_of_a_mixture_stays_near_bf16(tokens, tmp_path):
    needs_te()
    if reason := te_backend.why_not_fp8("tensorwise"):
        pytest.skip(reason)
    half = losses("tiny_moe", tokens, tmp_path / "bf16", "precision.dtype=bf16")
    eight = losses("tiny_moe", tokens, tmp_path / "fp8", "precision.dtype=bf16", "precision.fp8=tensorwise")
    assert eight == pytest.approx(half, rel=3e-2)


TE, TORCH = ["precision.backend=te"], ["precision.backend=torch"]
FP8 = ["precision.backend=te", "precision.fp8=tensorwise"]
PRECISION_AWARE = [
    "precision.backend=te",
    "precision.use_precision_aware_optimizer=true",
    "precision.exp_avg_dtype=bf16",
    "precision.exp_avg_sq_dtype=bf16",
]

HOST = ["precision.backend=te", "performance.optimizer_offload_fraction=1"]
HALF_ON_HOST = ["precision.backend=te", "performance.optimizer_offload_fraction=0.5"]
HELD_IN_FP8 = [*FP8, "performance.fp8_param_gather=true"]
PAIRS = {
    "te-torch": (TE, TORCH),
    "torch-te": (TORCH, TE),
    "te-fp8": (TE, FP8),
    "fp8-te": (FP8, TE),
    "precision-aware to itself": (PRECISION_AWARE, PRECISION_AWARE),
    "te to precision-aware": (TE, PRECISION_AWARE),
    "precision-aware to torch": (PRECISION_AWARE, TORCH),
    "host-host": (HOST, HOST),
    "host-torch": (HOST, TORCH),
    "te-host": (TE, HOST),
    "half host-half host": (HALF_ON_HOST, HALF_ON_HOST),
    "held-held": (HELD_IN_FP8, HELD_IN_FP8),
    "held-te": (HELD_IN_FP8, TE),
    "te-held": (TE, HELD_IN_FP8),
}


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_a_run_goes_on_with_another_backend_or_format(first, second, tokens, tmp_path):
    needs_te()
    bf16 = "precision.dtype=bf16"
    whole = losses("tiny_dense", tokens, tmp_path / "whole", bf16, *first)
    losses("tiny_dense", tokens, tmp_path / "run", bf16, *first, steps=STEPS // 2)
    both = losses("tiny_dense", tokens, tmp_path / "run", bf16, *second)
    assert both == pytest.approx(whole, rel=2e-2)
