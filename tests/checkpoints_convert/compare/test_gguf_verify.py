"""``mq convert verify`` of a model and a GGUF file of it: what passes, and what is caught."""

import json
from pathlib import Path

import pytest

from checkpoints_convert.convert import main
from checkpoints_convert.formats.gguf.reading import GgufFile
from tests.checkpoints_convert.formats.weights import fitting_model
from tests.checkpoints_convert.models import with_tokenizer
from tests.checkpoints_convert.refusal import refused
from tests.tiers import cases

KINDS = cases(["Q8_0", "Q4_K_M"], ["BF16", "F16", "Q6_K", "Q5_K_M", "Q4_0", "Q3_K_M", "Q2_K"])


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer) -> Path:
    return with_tokenizer(fitting_model("qwen2 fitting", tmp_path_factory.mktemp("hf") / "small"), tokenizer)


@pytest.fixture(scope="module")
def files(source, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("gguf") / "out"
    assert main(["quantize", str(source), str(out), "--format", f"gguf:{','.join(KINDS)}"]) == 0
    return {kind: out / f"small-{kind}.gguf" for kind in KINDS}


def verdict(capsys, *words: object) -> tuple[int, dict]:
    code = main(["verify", *(str(word) for word in words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_model(kind, source, files, capsys):
    code, found = verdict(capsys, source, files[kind], "--logits")
    assert (code, found["differences"]) == (0, 0), found["worst"]
    assert found["quantized"]["scheme"] == "gguf"
    assert 0 <= found["logits"]["kl_mean"] <= found["logits"]["kl_tolerance"]


def test_a_changed_tensor_is_caught(source, files, tmp_path, capsys):
    """The scale of one block of ffn_down, of which a block of Q8_0 has 2 bytes, and 32 codes."""
    stored = GgufFile(files["Q8_0"]).stored["blk.1.ffn_down.weight"]
    data = bytearray(files["Q8_0"].read_bytes())
    for block in range(0, stored.size, 34):
        data[stored.offset + block + 1] ^= 0x80  # the sign of the scale
    (tmp_path / "changed.gguf").write_bytes(data)
    code, found = verdict(capsys, source, tmp_path / "changed.gguf")
    assert code == 1
    assert [one["name"] for one in found["worst"]] == ["model.layers.1.mlp.down_proj.weight"]


def test_another_tokenizer_is_caught(source, files, tmp_path, capsys):
    data = files["Q8_0"].read_bytes()
    at = data.index(b"tokenizer.ggml.tokens")
    place = data.index(b"the", at)
    (tmp_path / "changed.gguf").write_bytes(data[:place] + b"hte" + data[place + 3 :])
    code, found = verdict(capsys, source, tmp_path / "changed.gguf")
    assert code == 1
    assert [one["name"] for one in found["worst"]] == ["tokenizer.ggml.tokens"]


def test_refusals(source, files, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(files["Q8_0"].read_bytes()[:5000])
    assert "cut" in refused("verify", source, tmp_path / "cut.gguf", exit_codes=(3,))
    assert "GGUF" in refused("quantize", files["Q8_0"], tmp_path / "out", "--format", "fp8", exit_codes=(3,))
