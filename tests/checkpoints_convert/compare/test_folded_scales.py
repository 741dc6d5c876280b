"""AWQ and SmoothQuant move scales between layers: the same model passes, one whose scales are not undone does not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints_convert.compare.test_quantized_verify import verdict
from tests.checkpoints_convert.dequantize.written import LAYERS, Written, source_model, write
from tests.tiers import cases

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8, "head_dim": 16}


def factors(count: int, seed: int) -> torch.Tensor:
    return torch.exp(0.3 * torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def fold(tensors: Tensors) -> None:
    """Scales as AWQ moves them, of every layer and expert; the model computes the same."""
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        attention = [f"{prefix}self_attn.{one}_proj.weight" for one in "qkv"]
        behind = [
            name for name in tensors if name.startswith(f"{prefix}mlp.") and not name.endswith("down_proj.weight")
        ]
        for norm, weights in (("input_layernorm", attention), ("post_attention_layernorm", behind)):
            scale = factors(tensors[attention[0]].shape[1], seed=layer + len(weights))
            tensors[f"{prefix}{norm}.weight"] /= scale
            for name in weights:
                tensors[name] *= scale
        for name in [name for name in behind if name.endswith("up_proj.weight")]:
            down = name.replace("up_proj", "down_proj")
            scale = factors(tensors[name].shape[0], seed=len(name))
            tensors[name] /= scale[:, None]
            tensors[down] *= scale
        value, output = attention[2], f"{prefix}self_attn.o_proj.weight"
        if tensors[value].shape[0] == tensors[output].shape[1]:  # as many KV heads as query heads
            scale = factors(tensors[value].shape[0], seed=3)
            tensors[value] /= scale[:, None]
            if (bias := value.replace("weight", "bias")) in tensors:
                tensors[bias] /= scale
            tensors[output] *= scale


def folded(source: Path, out: Path, change: Callable[[Tensors], Any] = lambda tensors: None) -> Path:
    """The source with scales moved, in float32, then ``change``."""
    shutil.copytree(source, out)
    tensors = {name: tensor.float() for name, tensor in load_file(out / "model.safetensors").items()}
    fold(tensors)
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


WAYS = {
    "awq": Written("awq", symmetric=False),
    "pack": Written("pack"),
    "int8": Written("int8", bits=8, strategy="channel"),
    "gptq": Written("gptq"),
}


MORE = [(name, kind) for name in WAYS for kind in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")]


@pytest.mark.parametrize(
    ("name", "kind"), cases([("awq", "qwen2"), ("int8", "qwen2_moe"), ("gptq", "qwen3"), ("pack", "qwen3_moe")], MORE)
)
def test_the_same_model(name: str, kind: str, tmp_path: Path, capsys: Any) -> None:
    sizes = SIZES | {"num_key_value_heads": 8 if kind == "qwen2" else 4}
    source = source_model(tmp_path / "source", kind, **sizes)
    write(folded(source, tmp_path / "folded"), tmp_path / "out", WAYS[name])
    code, found = verdict(capsys, source, tmp_path / "out")
    assert code == 0, found["worst"]
    assert found["quantized"]["scaled_norms"] == 2 * LAYERS


def scale(name: str, where: Any, by: float) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        tensors[name][where] *= by

    return change


WRONG: dict[str, Callable[[Tensors], Any]] = {
    "a norm whose scales went nowhere": scale("model.layers.1.input_layernorm.weight", slice(0, 64), 1.5),
    "a norm below zero": scale("model.layers.1.input_layernorm.weight", slice(0, 3), -1.0),
    "up_proj without down_proj": scale("model.layers.0.mlp.up_proj.weight", slice(0, 96), 2.0),
    "o_proj without v_proj": scale("model.layers.0.self_attn.o_proj.weight", (slice(None), slice(0, 64)), 0.5),
    "columns of q_proj": scale("model.layers.0.self_attn.q_proj.weight", (slice(None), slice(0, 64)), 1.3),
    "rows of k_proj": scale("model.layers.0.self_attn.k_proj.weight", slice(0, 64), 1.3),
    "a bias of v_proj": scale("model.layers.0.self_attn.v_proj.bias", slice(None), 2.0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_model(wrong: str, tmp_path: Path, capsys: Any) -> None:
    source = source_model(tmp_path / "source", **SIZES, num_key_value_heads=8)
    for name in cases(["awq"], ["int8", "pack"]):
        write(folded(source, tmp_path / f"{name} folded", WRONG[wrong]), tmp_path / name, WAYS[name])
        code, found = verdict(capsys, source, tmp_path / name)
        assert code == 1, wrong
        print(name, wrong, [(item["name"], item["detail"]) for item in found["worst"]])


def test_weights_that_are_clipped(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ's search for the largest value that is kept: its grid is narrower than the weight."""
    from tests.checkpoints_convert.dequantize import written

    nearest = written.nearest

    def clipped(weight: Any, **how: Any) -> written.Codes:
        found = nearest(weight, **how)
        found.scales = (found.scales * 0.7).astype(found.scales.dtype)
        of = found.group_of
        found.codes = ((weight / found.scales[:, of]).round() + found.zeros[:, of]).clip(0, 15).astype(int)
        return found

    source = source_model(tmp_path / "source", **SIZES, num_key_value_heads=8)
    monkeypatch.setattr(written, "nearest", clipped)
    write(folded(source, tmp_path / "folded"), tmp_path / "out", WAYS["awq"])
    code, found = verdict(capsys, source, tmp_path / "out")
    assert code == 0, found["worst"]
