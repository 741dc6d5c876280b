"""The weights that are read are those of the libraries that define the formats: compressed-tensors and transformers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compressed_tensors  # noqa: F401  (transformers reads its formats only where it is installed)
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from checkpoints_convert.dequantize.quantized_directory import QuantizedDirectory
from checkpoints_convert.formats.quantized_format import is_quantized
from tests.checkpoints_convert.dequantize.written import Written, source_model, write
from tests.tiers import THOROUGH, cases

SCHEMES: dict[str, tuple[Written, dict[str, Any]]] = {
    "pack-quantized": (Written("pack"), {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "pack-quantized asymmetric": (
        Written("pack", symmetric=False),
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "pack-quantized row": (Written("pack", strategy="channel"), {"num_bits": 4, "strategy": "channel"}),
    "int-quantized": (Written("int8", bits=8, strategy="channel"), {"num_bits": 8, "strategy": "channel"}),
    "float-quantized": (Written("fp8", strategy="channel"), {"num_bits": 8, "type": "float", "strategy": "channel"}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_model(tmp_path_factory.mktemp("source") / "hf", dtype=torch.float32)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_the_library_compresses(name: str, source: Path, tmp_path: Path) -> None:
    """Its compressor packs weights with scales of our choice; we read what its decompressor gives."""
    how, told = SCHEMES[name]
    arguments = QuantizationArgs(**told)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    library = BaseCompressor.get_value_from_registry(name.split()[0])
    write(source, tmp_path / "out", how)
    path = tmp_path / "out" / "model.safetensors"
    stored, original = load_file(path), load_file(source / "model.safetensors")
    wanted = {}
    for weight in filter(is_quantized, original):
        module = weight.removesuffix(".weight")
        scale = stored[f"{module}.weight_scale"].float()
        state = {"weight": original[weight], "weight_scale": scale}
        if arguments.symmetric is False:
            state["weight_zero_point"] = torch.randint(-8, 8, scale.shape).to(torch.int8)
        packed = library.compress(dict(state), scheme)
        for part, tensor in packed.items():
            stored[f"{module}.{part}"] = tensor.contiguous()
        wanted[weight] = library.decompress(dict(packed), scheme)["weight"].float()
    save_file(stored, path, metadata={"format": "pt"})
    read = QuantizedDirectory(tmp_path / "out")
    assert read.weights.keys() == wanted.keys()
    for weight, values in wanted.items():
        assert torch.equal(read.rows(weight, 0, len(values)), values), weight


LOADED = {
    "pack": Written("pack"),
    "int8": Written("int8", bits=8, strategy="channel"),
    "fp8": Written("fp8", strategy="channel"),
    "fp8-block": Written("fp8-block", block=(32, 32)),
}


@pytest.mark.parametrize("name", cases(["pack"], ["int8", "fp8", "fp8-block"]))
def test_what_transformers_loads(name: str, source: Path, tmp_path: Path) -> None:
    """Weights of the model that transformers makes of the same directory, dequantized by its own code."""
    import transformers
    from transformers.utils.quantization_config import CompressedTensorsConfig

    write(source, tmp_path / "out", LOADED[name])
    how = {} if name == "fp8-block" else {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **how)
    read = QuantizedDirectory(tmp_path / "out")
    state = model.state_dict()
    for weight in read.weights:
        values = read.rows(weight, 0, read.tensors[weight].shape[0])
        # It multiplies in the dtype of the scales, float16 here.
        assert torch.allclose(state[weight].float(), values, rtol=2**-10, atol=0), weight


# In a process of its own: gptqmodel replaces the process's standard error.
_QUANTIZE = """
import sys, torch
from gptqmodel import GPTQModel, QuantizeConfig
source, out, act_order = sys.argv[1:]
how = QuantizeConfig(bits=4, group_size=32, desc_act=act_order == "True", sym=True)
model = GPTQModel.load(source, how)
draw = torch.Generator().manual_seed(1)
ids = [torch.randint(160, (128,), generator=draw) for _ in range(32)]
model.quantize([{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids], batch_size=1)
model.save(out)
"""


@pytest.mark.skipif(not THOROUGH, reason="gptqmodel takes minutes to import and to quantize")
@pytest.mark.parametrize("act_order", [False, True])
def test_what_gptqmodel_writes(act_order: bool, tmp_path: Path, capsys: Any) -> None:
    """A directory that gptqmodel quantized and saved by itself: read, and within the limits of a comparison."""
    from tests.checkpoints_convert.compare.test_quantized_verify import verdict

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    source, out = source_model(tmp_path / "hf", dtype=torch.float32, **sizes), tmp_path / "out"
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2"}
    subprocess.run([sys.executable, "-c", _QUANTIZE, source, out, str(act_order)], check=True, env=environment)
    for path in out.glob("*token*"):  # of a model without a tokenizer, it saves an empty one
        path.unlink()
    _, found = verdict(capsys, source, out, "--logits")
    print(found["quantized"]["worst"][0], found["logits"]["kl_mean"])
    # gptqmodel adds eos_token to config.json and a pad_token_id to generation_config.json.
    assert {item["kind"] for item in found["worst"]} <= {"configuration"}, found["worst"]
    assert found["logits"]["passes"]
    assert found["quantized"]["weights"] == 14
