"""Quantizes a model with gptqmodel, in a process of its own, and saves what its integers stand for.

Usage: python -m tests.checkpoints_convert.quantize.gptqmodel_oracle MODEL OUT JSON. JSON has method (gptq or awq), ids,
and of GPTQ sym and desc_act. gptqmodel's model is in OUT, its weights as float32 in OUT/values.safetensors.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Of a word of gptqmodel's AWQ format, the column that each place holds.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def main(model: Path, out: Path, request: dict[str, Any]) -> None:
    """Quantizes and saves."""
    os.environ.update(GPTQMODEL_CPU_WORKERS="2", GPTQMODEL_DISABLE_PACK_EXT="1")
    from gptqmodel import GPTQModel, QuantizeConfig

    method = request["method"]
    options = {"method": "awq", "format": "gemm"} if method == "awq" else {
        "sym": request["sym"],
        "desc_act": request["desc_act"],
        "damp_percent": 0.01,
        "act_group_aware": False,
        "format": "gptq_v2",
    }  # fmt: skip
    _with_tokenizer(model)
    loaded = GPTQModel.load(str(model), QuantizeConfig(bits=4, group_size=128, **options), device="cpu")
    rows = [torch.tensor(row)[None] for row in request["ids"]]
    loaded.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=1)
    loaded.save(str(out))
    stored: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        stored |= load_file(path)
    save_file(awq_values(stored) if method == "awq" else gptq_values(stored), out / "values.safetensors")


def gptq_values(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights [out, in] of the format gptq_v2, which stores zeros as they are."""
    places = torch.arange(0, 32, 4)
    found = {}
    for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        words, scales, group = (
            stored[f"{name}.qweight"],
            stored[f"{name}.scales"].float(),
            stored[f"{name}.g_idx"].long(),
        )
        codes = (words[:, None] >> places[:, None] & 15).flatten(0, 1).float()
        zeros = (stored[f"{name}.qzeros"][:, :, None] >> places & 15).flatten(1).float()
        found[f"{name}.weight"] = ((codes - zeros[group]) * scales[group]).t().contiguous()
    return found


def awq_values(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights [out, in] of AWQ's gemm format, and every other tensor, because norms have scales folded in."""
    place_of = torch.tensor(_AWQ_ORDER).argsort() * 4
    packed = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    found = {name: value.float() for name, value in stored.items() if name.rpartition(".")[0] not in packed}
    for name in packed:
        codes, zeros = (
            (stored[f"{name}.{part}"][:, :, None] >> place_of & 15).flatten(1).float() for part in ("qweight", "qzeros")
        )
        scales = stored[f"{name}.scales"].float()
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
        found[f"{name}.weight"] = ((codes - zeros[group]) * scales[group]).t().contiguous()
        if (bias := stored.get(f"{name}.bias")) is not None:
            found[f"{name}.bias"] = bias.float()
    return found


def _with_tokenizer(model: Path) -> None:
    """gptqmodel loads a tokenizer, though it is given ids."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{index}": index for index in range(255)} | {"<|endoftext|>": 255}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(model / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
