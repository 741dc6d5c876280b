"""Plans: what is read a few rows at a time, what a calibrated method gives instead, and the files of a large model."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.conversion import worker_bytes
from checkpoints_convert.formats.awq import Awq
from checkpoints_convert.formats.compressed_tensors import W4A16, W8A8
from checkpoints_convert.formats.gptq import Gptq
from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from checkpoints_convert.formats.registry import FORMATS
from checkpoints_convert.model_source import open_model_source
from checkpoints_convert.quantize import plan
from checkpoints_convert.quantize.plan import bits_a_weight, plan_files
from checkpoints_convert.quantize.run import QuantizeOptions, quantize
from megatron_qwen.checkpoint.read import TensorInfo
from megatron_qwen.hf.mapping import hf_tensors
from megatron_qwen.recipes.registry import RECIPES
from tests.checkpoints_convert.formats.weights import encoded, fitting_model
from tests.tiers import cases


@dataclass
class Unread:
    """A model whose values are never asked for while files are planned."""

    tensors: dict[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise AssertionError(name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("recipe", cases(["qwen2_5_72b"], ["qwen3_30b_a3b", "qwen2_57b_a14b"]))
def test_files_of_a_large_model(name, recipe):
    model = RECIPES[recipe]().model
    tensors = {item.name: TensorInfo(item.shape, torch.bfloat16) for item in hf_tensors(model)}
    files = plan_files(Unread(tensors), model, FORMATS[name], dtype=torch.float16)
    low, high = (4.1, 4.7) if "4" in name else (8.0, 8.6)
    assert low < bits_a_weight(files, model) < high
    assert all(file.size < 5.1e9 for file in files)
    # What a weight of 72B is written as, and blocks.
    assert worker_bytes(files) < 500e6


@dataclass
class Stepped:
    """One weight; notes how its rows are asked for."""

    values: torch.Tensor
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {"a.b_proj.weight": TensorInfo(tuple(self.values.shape), self.values.dtype)}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.asked.append((start, stop))
        return self.values[start:stop]


@pytest.mark.parametrize("format_", [Gptq(4), Gptq(8), Gptq(4, symmetric=False), Awq()])
def test_blocks_of_rows_give_what_the_whole_weight_gives(format_, monkeypatch):
    monkeypatch.setattr(plan, "_STEP_BYTES", 24 * 256 * 4)
    values = torch.randn(104, 256).bfloat16()
    source = Stepped(values)

    outputs = plan._rounded(source, "a.b_proj.weight", (104, 256), format_.encoding())
    expected = encoded(format_, values)
    assert {output.name.rpartition(".")[2] for output in outputs} == set(expected)
    for output in outputs:
        ((start, stop),) = output.blocks(1 << 20)
        found = output.values(start, stop)[0]
        assert torch.equal(found, expected[output.name.rpartition(".")[2]]), output.name
    assert max(stop - start for start, stop in source.asked) == 24
    assert source.asked[:5] == [(0, 24), (24, 48), (48, 72), (72, 96), (96, 104)]


@dataclass(frozen=True)
class Solved:
    """A method that makes every code 0 or the largest, and doubles the norms."""

    source: dict[str, torch.Tensor]
    grid: Grid
    digest: str = "of a test"
    prepared: list[bool] = field(default_factory=list)

    def prepare(self) -> None:
        self.prepared.append(True)

    def linear(self, name: str) -> QuantizedLinear:
        nearest = self.grid.nearest(self.source[name])
        return QuantizedLinear((nearest.codes > nearest.zeros[0, 0]).byte() * 15, nearest.scales, nearest.zeros)

    def changed(self, name: str) -> torch.Tensor | None:
        return self.source[name] * 2 if name.endswith("layernorm.weight") else None


@pytest.mark.parametrize("format_", [Gptq(4), Awq(), W4A16(), W8A8()])
def test_what_a_calibrated_method_found_is_written(format_, tmp_path):
    hf = fitting_model("qwen2 fitting", tmp_path / "hf")
    original = load_file(hf / "model.safetensors")
    solved = Solved(original, format_.grid)
    quantize(open_model_source(hf), tmp_path / "out", format_, QuantizeOptions("gptq", quiet=True), solved=solved)
    assert solved.prepared == [True]
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in original.items():
        if is_quantized(name):
            for part, expected in format_.pack(solved.linear(name)).items():
                assert torch.equal(found[f"{name.rpartition('.')[0]}.{part}"], expected), (name, part)
        else:
            twice = values * 2 if name.endswith("layernorm.weight") else values
            assert torch.equal(found[name], twice.to(found[name].dtype)), name
    assert "GPTQ (https" in (tmp_path / "out" / "README.md").read_text()
