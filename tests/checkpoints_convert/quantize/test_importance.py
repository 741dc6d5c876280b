"""Importances against numpy, from the inputs that transformers' whole model gives."""

import numpy as np
import torch
import transformers

from checkpoints_convert.quantize.calibration_options import CalibrationOptions
from checkpoints_convert.quantize.importance import importances
from tests.checkpoints_convert.quantize.trained import made, opened, samples

OPTIONS = CalibrationOptions(workers=2)


def test_mean_squared_inputs(tmp_path_factory, tmp_path):
    directory, data = made("qwen2", tmp_path_factory), samples(6)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda module, given, key=f"{name}.weight": expected.update(
                    {key: np.mean(given[0].double().numpy() ** 2, axis=(0, 1))}
                )
            )
    with torch.no_grad():
        model(input_ids=data.ids)
    found = importances(opened(directory), samples=data, options=OPTIONS, work=tmp_path, progress=lambda _: None)
    assert len(expected) == 14
    for name, squares in expected.items():
        assert found.column(name).dtype == torch.float32
        assert np.allclose(found.column(name).numpy(), squares, rtol=1e-3, atol=1e-6), name


def test_experts(tmp_path_factory, tmp_path):
    """Over the tokens of each expert; one that no token reaches has ones."""
    source = opened(made("qwen3_moe", tmp_path_factory))
    data = samples(1, 2)
    found = importances(source, samples=data, options=OPTIONS, work=tmp_path, progress=lambda _: None)

    def stacked(layer: int, kind: str) -> torch.Tensor:
        return torch.stack(
            [found.column(f"model.layers.{layer}.mlp.experts.{index}.{kind}.weight") for index in range(4)]
        )

    assert stacked(1, "down_proj").shape == (4, 128)
    # Two tokens with two experts each may reach all four, but not those of both layers with this model.
    gates = [stacked(layer, "gate_proj") for layer in range(2)]
    untouched = [(gate == 1).all(1) for gate in gates]
    assert any(one.any() for one in untouched)
    for layer, missed in enumerate(untouched):
        assert torch.equal((stacked(layer, "down_proj") == 1).all(1), missed)
