"""The store gives back what was solved, and counts only layers that are whole."""

import pytest
import torch

from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from checkpoints_convert.quantize.layer_solution import LayerSolution
from checkpoints_convert.quantize.solved_store import SolvedStore
from megatron_qwen.errors import ConversionError

IDENTITY = {"source": "abc", "options": {"damping": 0.01, "act_order": False}}
NAME = "self_attn.q_proj.weight"


def solution(bits: int, *, seed: int = 0) -> LayerSolution:
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, 32, False, torch.float16)
    one, other = (grid.nearest(torch.randn(8, 64, generator=generator)) for _ in range(2))
    group_of = torch.randperm(64, generator=generator).to(torch.int32) // 32
    return LayerSolution(
        {NAME: QuantizedLinear(one.codes, one.scales, one.zeros, group_of), "mlp.up_proj.weight": other},
        {"input_layernorm.weight": torch.randn(64, generator=generator).bfloat16()},
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_committed_is_read(bits, tmp_path):
    store = SolvedStore.open(tmp_path, IDENTITY, layers=3)
    given = solution(bits)
    store.commit(1, given)
    found = SolvedStore.open(tmp_path, IDENTITY, layers=3)
    for name, linear in given.linears.items():
        read = found.linear(f"model.layers.1.{name}")
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(read, part), getattr(linear, part)), part
            assert getattr(read, part).dtype == getattr(linear, part).dtype
        assert (read.group_of is None) == (linear.group_of is None)
        assert torch.equal(read.values(), linear.values())
    assert torch.equal(found.changed("model.layers.1.input_layernorm.weight"), given.changed["input_layernorm.weight"])
    assert found.changed("model.layers.1.post_attention_layernorm.weight") is None
    assert found.changed("model.norm.weight") is None
    assert found.linears(1) == ["model.layers.1.mlp.up_proj.weight", f"model.layers.1.{NAME}"]


def test_layers_that_are_done(tmp_path):
    store = SolvedStore.open(tmp_path, IDENTITY, layers=4)
    assert store.completed() == 0
    for layer in (0, 1, 3):
        store.commit(layer, solution(4, seed=layer))
    assert store.completed() == 2
    store.commit(2, solution(4))
    assert store.completed() == 4
    path = tmp_path / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    assert store.completed() == 1
    (tmp_path / "layer-00000.xxh3").unlink()
    assert store.completed() == 0


def test_the_same_solution_has_the_same_bytes(tmp_path):
    stores = [SolvedStore.open(tmp_path / name, IDENTITY, layers=1) for name in "ab"]
    for store in stores:
        store.commit(0, solution(4))
    assert len({(store.directory / "layer-00000.safetensors").read_bytes() for store in stores}) == 1


def test_another_calibration_is_refused(tmp_path):
    SolvedStore.open(tmp_path, IDENTITY, layers=2).commit(0, solution(4))
    other = {"source": "abc", "options": {"damping": 0.1, "act_order": False}}
    with pytest.raises(ConversionError, match=r"options.damping was 0.01, is 0.1.*--restart"):
        SolvedStore.open(tmp_path, other, layers=2)
    assert SolvedStore.open(tmp_path, IDENTITY, layers=2).completed() == 1
    assert SolvedStore.open(tmp_path, IDENTITY, layers=2, restart=True).completed() == 1, "the same is kept"
    assert SolvedStore.open(tmp_path, other, layers=2, restart=True).completed() == 0


@pytest.mark.parametrize("identity", [None, "{"])
def test_layers_of_nobody_knows_what_are_not_taken(identity, tmp_path):
    SolvedStore.open(tmp_path, IDENTITY, layers=2).commit(0, solution(4))
    (tmp_path / "identity.json").unlink()
    if identity is not None:
        (tmp_path / "identity.json").write_text(identity)
    assert SolvedStore.open(tmp_path, IDENTITY, layers=2).completed() == 0


def test_what_is_not_finite_is_refused(tmp_path):
    broken = solution(4)
    next(iter(broken.linears.values())).scales[0] = torch.nan
    store = SolvedStore.open(tmp_path, IDENTITY, layers=2)
    with pytest.raises(ConversionError, match="not finite"):
        store.commit(0, broken)
    assert store.completed() == 0
