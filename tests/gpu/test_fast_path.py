"""On a GPU: what ``performance`` can force trains the same model as without it, and the preset says what it chose."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import run
from tests.gpu.test_backends import STEPS, losses, needs_te

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

BF16 = ["precision.dtype=bf16", "precision.backend=te"]
FP8 = [*BF16, "precision.fp8=tensorwise"]
FORCED = {
    "CUDA graphs": (BF16, ["performance.cuda_graph_impl=local"]),
    "CUDA graphs in FP8": (FP8, ["performance.cuda_graph_impl=local"]),
    "weights in FP8": (FP8, ["performance.fp8_param_gather=true"]),
    "activations on the host": (BF16, ["performance.cpu_offloading_num_layers=1"]),
    "optimizer on the host": (BF16, ["performance.optimizer_offload_fraction=1"]),
    "no fused kernels": (BF16, ["performance.fused_kernels=false"]),
    "full recompute": (BF16, ["training.recompute_granularity=full"]),
}


@pytest.mark.parametrize("name", FORCED)
def test_what_is_forced_trains_the_same(name, tokens, tmp_path):
    needs_te()
    common, forced = FORCED[name]
    plain = losses("tiny_dense", tokens, tmp_path / "plain", *common)
    assert losses("tiny_dense", tokens, tmp_path / "forced", *common, *forced) == pytest.approx(plain, rel=1e-2)


def test_the_preset_on_a_gpu(tokens, tmp_path):
    needs_te()
    losses("tiny_moe", tokens, tmp_path / "run", *BF16)
    card = json.loads((tmp_path / "run" / "performance.json").read_text())
    chosen = {field: choice["value"] for field, choice in card["choices"].items()}
    assert chosen["performance.fused_kernels"] is True
    assert chosen["performance.moe_grouped_gemm"] is True
    assert chosen["training.recompute_granularity"] == "none"
    assert card["backend"] == "te"
    assert card["memory"]["peak_gib"] > card["memory"]["weights_gib"]
    assert card["steps_measured"] == STEPS - 3


def test_all_choices_are_logged(tokens: Path, tmp_path):
    words = [f"data.path={tokens}", "training.train_iters=3", "--run-dir", tmp_path / "run", "--verbose"]
    done = run("launch.train", "tiny_dense", *words, gpu=True, check=True)
    assert done.stderr.count("performance: ") == 16  # with the line that counts them
