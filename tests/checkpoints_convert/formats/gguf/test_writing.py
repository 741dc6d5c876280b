"""Files as others read them, in one or several, and a conversion that is killed at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from checkpoints_convert.compare.sides import open_side
from checkpoints_convert.formats.gguf.importances import GivenImportances
from checkpoints_convert.formats.gguf.reading import GgufFile
from checkpoints_convert.formats.gguf.writing import GgufOptions, write_gguf
from checkpoints_convert.release import ReleaseManifest, sha256
from megatron_qwen.errors import ConversionError
from tests.checkpoints_convert.formats.gguf.llama_cpp import LlamaModel
from tests.checkpoints_convert.formats.gguf.models import MODELS, importances, make
from tests.tiers import THOROUGH

KILLS = 15
_SCRIPT = """
import sys
from pathlib import Path
from checkpoints_convert.compare.sides import open_side
from checkpoints_convert.formats.gguf.writing import GgufOptions, write_gguf
write_gguf(open_side(Path(sys.argv[1])), Path(sys.argv[2]), ["Q4_K_M", "Q8_0"], GgufOptions(name="m", quiet=True))
"""


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen2 of 80 layers"])
def test_float32_is_the_source(side, name, tmp_path):
    """Names, shapes and values through the gguf package's reader and through ours."""
    source = side(name)
    write_gguf(source, tmp_path / "out", ["F32"], GgufOptions(name="m", quiet=True))
    path = tmp_path / "out" / "m-F32.gguf"
    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    ours = GgufFile(path)
    if name == "qwen2_moe tied":  # llama.cpp's qwen2moe has an output of its own, so the file is of an untied model
        rows = source.model.vocab_size
        embedding, output = (ours.rows(weight, 0, rows) for weight in ("model.embed_tokens.weight", "lm_head.weight"))
        assert torch.equal(embedding, output)
    else:
        assert ours.architecture == source.architecture
    assert ("output.weight" in theirs) == (not MODELS[name]["tie_word_embeddings"] or name == "qwen2_moe tied")
    for weight, info in source.tensors.tensors.items():
        expected = source.tensors.rows(weight, 0, info.shape[0]).float()
        assert torch.equal(ours.rows(weight, 0, info.shape[0]), expected), weight
    bias = "model.layers.1.self_attn.k_proj.bias"
    if bias in source.tensors.tensors:
        assert (
            theirs["blk.1.attn_k.bias"].data.tolist()
            == source.tensors.rows(bias, 0, len(theirs["blk.1.attn_k.bias"].data)).tolist()
        )
    if "moe" in name:
        experts = torch.from_numpy(theirs["blk.1.ffn_down_exps.weight"].data.copy())
        one = "model.layers.1.mlp.experts.3.down_proj.weight"
        assert torch.equal(experts[3], source.tensors.rows(one, 0, experts.shape[1]))


def test_source_of_bf16_and_blocks(tmp_path):
    """The same bytes whatever the threads, and from BF16 those of its float32 values."""
    source = open_side(make("qwen2_moe", tmp_path / "hf", dtype=torch.bfloat16))
    for name, threads in (("a", 1), ("b", 3)):
        weights = GivenImportances(importances("qwen2_moe"))
        options = GgufOptions(name="m", quiet=True, threads=threads, importances=weights)
        write_gguf(source, tmp_path / name, ["Q8_0", "BF16"], options)
    assert sha256(tmp_path / "a" / "m-Q8_0.gguf") == sha256(tmp_path / "b" / "m-Q8_0.gguf")
    ours = GgufFile(tmp_path / "a" / "m-BF16.gguf")
    for weight, info in source.tensors.tensors.items():
        assert torch.equal(ours.rows(weight, 0, info.shape[0]), source.tensors.rows(weight, 0, info.shape[0]).float())


def test_several_files(side, tmp_path):
    source = side("qwen3_moe")
    for name, limit in (("one", None), ("many", 600_000)):
        options = GgufOptions(name="m", quiet=True, max_shard_bytes=limit)
        write_gguf(source, tmp_path / name, ["Q8_0"], options)
    files = sorted((tmp_path / "many").glob("*.gguf"))
    assert len(files) > 3
    assert files[0].name == f"m-Q8_0-00001-of-{len(files):05d}.gguf"
    assert all(GGUFReader(file).get_field("split.count").contents() == len(files) for file in files)
    one, many = GgufFile(tmp_path / "one" / "m-Q8_0.gguf"), GgufFile(files[1])
    assert one.config == many.config
    for weight, info in one.tensors.items():
        assert torch.equal(one.rows(weight, 0, info.shape[0]), many.rows(weight, 0, info.shape[0]))
    with LlamaModel(tmp_path / "one" / "m-Q8_0.gguf") as whole, LlamaModel(files[0]) as parts:
        assert torch.equal(*(model.logits([5, 9, 200], vocab_size=640) for model in (whole, parts)))
    files[2].rename(files[2].with_suffix(".moved"))
    with pytest.raises(ConversionError, match="missing"):
        GgufFile(files[0])


def test_manifest_and_card(side, tmp_path):
    out = tmp_path / "out"
    options = GgufOptions(name="m", quiet=True, license_="apache-2.0")
    write_gguf(side("qwen2 narrow"), out, ["Q8_0", "F16"], options)
    manifest = ReleaseManifest(out / "manifest.json")
    assert not manifest.damage(out)
    assert {"m-Q8_0.gguf", "m-F16.gguf", "README.md"} == set(manifest.files)
    assert "| Q8_0 | 8.5" in (out / "README.md").read_text()
    again = write_gguf(side("qwen2 narrow"), out, ["Q8_0", "F16"], options)
    assert again.complete_before
    assert str(tmp_path) not in (out / "manifest.json").read_text()


@pytest.mark.skipif(not THOROUGH, reason="thorough tier: quantize/test_resume.py kills the same writer in every run")
def test_killed_at_random_moments(side, tmp_path):
    source = side("qwen2 tied")
    words = [sys.executable, "-c", _SCRIPT, str(source.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    subprocess.run([*words, str(tmp_path / "whole" / "out")], env=environment, check=True)
    length, dice = time.monotonic() - started, random.Random(5)
    expected = {path.name: sha256(path) for path in (tmp_path / "whole" / "out").iterdir()}
    for number in range(KILLS):
        out = tmp_path / f"killed {number}" / "out"
        process = subprocess.Popen([*words, str(out)], env=environment, start_new_session=True)
        time.sleep(length * dice.uniform(0.5, 0.98))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run([*words, str(out)], env=environment, check=True)
        assert {path.name: sha256(path) for path in out.iterdir()} == expected, number


def edited(directory: Path, **fields: object) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, name, fields, says):
    source = open_side(edited(make(name, tmp_path / "hf"), **fields))
    with pytest.raises(ConversionError, match=says):
        write_gguf(source, tmp_path / "out", ["Q8_0"], GgufOptions(quiet=True))


def test_mistakes_are_told_together(side, tmp_path):
    weights = GivenImportances({"blk.0.attn_q.weight": torch.ones(3), "no such tensor": torch.ones(224)})
    with pytest.raises(ConversionError) as caught:
        write_gguf(side("qwen2 narrow"), tmp_path / "out", ["Q9"], GgufOptions(name="a/b", importances=weights))
    said = caught.value.render()
    assert all(word in said for word in ("Q9", "a/b", "blk.0.attn_q.weight", "no such tensor"))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "F32"), (float("inf"), "Q8_0"), (1e30, "Q4_0"), (1e6, "F16")]
)
def test_values_that_a_kind_cannot_hold_are_refused(tmp_path, value, kind):
    from safetensors.torch import load_file, save_file

    directory = make("qwen2 narrow", tmp_path / "hf")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_up\.weight"):
        write_gguf(open_side(directory), tmp_path / "out", [kind], GgufOptions(quiet=True))
    assert not (tmp_path / "out").exists()
