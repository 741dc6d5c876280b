"""Quantized directories written by hand are read as the weights they stand for, whole and by rows."""

from pathlib import Path

import pytest
import torch

from checkpoints_convert.dequantize.quantized_directory import QuantizedDirectory
from tests.checkpoints_convert.dequantize.written import Written, source_model, write

WAYS = {
    "gptq 4": Written("gptq"),
    "gptq 8": Written("gptq", bits=8),
    "gptq_v2 act-order": Written("gptq", version="gptq_v2", act_order=True),
    "gptq_v2 asymmetric": Written("gptq", version="gptq_v2", symmetric=False),
    "gptq act-order 8": Written("gptq", bits=8, act_order=True),
    "gptq row": Written("gptq", group=-1),
    "awq": Written("awq", symmetric=False),
    "pack group": Written("pack"),
    "pack channel": Written("pack", strategy="channel"),
    "pack 8": Written("pack", bits=8),
    "pack act-order": Written("pack", act_order=True),
    "pack asymmetric": Written("pack", symmetric=False),
    "int8": Written("int8", bits=8, strategy="channel"),
    "int8 asymmetric": Written("int8", bits=8, strategy="channel", symmetric=False),
    "fp8 channel": Written("fp8", strategy="channel"),
    "fp8 tensor": Written("fp8", strategy="tensor"),
    "fp8 block": Written("fp8", strategy="block"),
    "fp8-block": Written("fp8-block"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_model(tmp_path_factory.mktemp("source") / "hf")


@pytest.mark.parametrize("name", WAYS)
def test_stands_for_what_was_written(name: str, source: Path, tmp_path: Path) -> None:
    how = WAYS[name]
    meaning = write(source, tmp_path / "out", how)
    read = QuantizedDirectory(tmp_path / "out")
    assert read.tensors.keys() == meaning.keys()
    assert len(read.weights) == 14
    for tensor, wanted in meaning.items():
        rows = wanted.shape[0]
        assert torch.equal(read.rows(tensor, 0, rows), wanted), tensor
        # Borders inside words and blocks.
        for start, stop in ((0, 1), (3, 11), (rows - 5, rows), (7, rows - 1)):
            assert torch.equal(read.rows(tensor, start, stop), wanted[start:stop]), (tensor, start, stop)
    for tensor in read.weights:
        assert read.tensors[tensor].dtype == torch.float32


@pytest.mark.parametrize("kind", ["qwen3", "qwen2_moe", "qwen3_moe"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    """Experts are quantized; routers and the gate of the shared expert are not."""
    source = source_model(tmp_path / "hf", kind, tie_word_embeddings=kind == "qwen3")
    for name in ("gptq 4", "awq", "pack group", "fp8-block"):
        meaning = write(source, tmp_path / name, WAYS[name])
        read = QuantizedDirectory(tmp_path / name)
        assert all(torch.equal(read.rows(one, 0, len(wanted)), wanted) for one, wanted in meaning.items())
        assert not any(one.endswith(("gate.weight", "embed_tokens.weight")) for one in read.weights)


def test_the_grid_of_rows(source: Path, tmp_path: Path) -> None:
    """Values are on the grid; nearest values of the original are what was written, and steps separate neighbours."""
    from safetensors.torch import load_file

    original = load_file(source / "model.safetensors")
    for name, how in WAYS.items():
        write(source, tmp_path / name, how)
        read = QuantizedDirectory(tmp_path / name)
        for tensor, weight in read.weights.items():
            rows = weight.rows(1, 31)
            found = rows.values()
            assert torch.equal(rows.nearest(original[tensor][1:31].float()), found), (name, tensor)
            if not name.startswith("fp8"):  # there, the next value may have the next exponent
                assert torch.equal(rows.nearest(found + 0.4 * rows.step()), found)
            assert ((found / rows.step()).round() - found / rows.step()).abs().max() < 1e-3
