"""``mq convert quantize``: what it takes, what it writes, and what it refuses."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from checkpoints_convert.convert import main
from checkpoints_convert.from_hf import ImportOptions, convert
from checkpoints_convert.quantize.names import GGUF_KINDS, SAFETENSORS_FORMATS
from checkpoints_convert.release import ReleaseManifest
from tests.checkpoints_convert.formats.weights import fitting_model
from tests.checkpoints_convert.models import with_tokenizer
from tests.checkpoints_convert.refusal import refused
from tests.checkpoints_convert.test_resume import hashes

NEAREST = ("--method", "nearest")


@pytest.fixture(scope="module")
def hf(tmp_path_factory, tokenizer):
    return with_tokenizer(fitting_model("qwen2 fitting", tmp_path_factory.mktemp("hf") / "small"), tokenizer)


@pytest.fixture(scope="module")
def moe(tmp_path_factory, tokenizer):
    return with_tokenizer(fitting_model("qwen2_moe fitting", tmp_path_factory.mktemp("hf") / "moe"), tokenizer)


def quantize(*words: object) -> int:
    return main(["quantize", *(str(word) for word in words)])


def test_a_release(hf, tmp_path, capsys):
    assert quantize(hf, tmp_path / "out", "--format", "fp8", "--license", "apache-2.0", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["format"], answer["method"], answer["complete_before"]) == ("fp8", "nearest", False)
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("license: apache-2.0", "base_model: small", "rounded to nearest", "bits a weight", "from_pretrained"):
        assert words in card
    manifest = ReleaseManifest(tmp_path / "out" / "manifest.json")
    assert not manifest.damage(tmp_path / "out")
    assert manifest.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "float8_e4m3fn"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("some text")["input_ids"]
    assert ids == transformers.AutoTokenizer.from_pretrained(hf)("some text")["input_ids"]
    assert quantize(hf, tmp_path / "out", "--format", "fp8", "--license", "apache-2.0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete_before"]


def test_formats_that_are_added_to_a_folder(hf, tmp_path):
    out = tmp_path / "out"

    def rows() -> list[str]:
        return [line.split("]")[0] for line in (out / "README.md").read_text().splitlines() if line.startswith("| [")]

    assert quantize(hf, out, "--format", "w8a8,fp8", *NEAREST) == 0
    assert rows() == ["| [fp8", "| [w8a8"]
    assert quantize(hf, out, "--format", "fp8-block,gguf:F16,BF16") == 0
    assert rows() == ["| [fp8-block", "| [fp8", "| [gguf", "| [gguf", "| [w8a8"]
    shutil.rmtree(out / "fp8")
    assert quantize(hf, out, "--format", "w8a8,fp8-block", *NEAREST) == 0
    assert rows() == ["| [fp8-block", "| [gguf", "| [gguf", "| [w8a8"]


@pytest.mark.parametrize("name", ["gptq-int4", "fp8-block"])
def test_a_checkpoint_gives_what_its_directory_gives(name, hf, tmp_path):
    """Rows of query, key and value are interleaved there."""
    convert(hf, tmp_path / "start", ImportOptions(quiet=True))
    for source, out in ((hf, "of_hf"), (tmp_path / "start", "of_checkpoint")):
        assert quantize(source, tmp_path / out, "--format", name, *NEAREST) == 0
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("of_hf", "of_checkpoint"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)) for key in one)
    stated = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("of_hf", "of_checkpoint")]
    assert stated[0]["quantization_config"] == stated[1]["quantization_config"]
    assert (tmp_path / "of_checkpoint" / "tokenizer.json").is_file()


def test_files_of_another_size_and_more_workers_hold_the_same_tensors(moe, tmp_path):
    assert quantize(moe, tmp_path / "one", "--format", "w4a16", *NEAREST) == 0
    assert (
        quantize(moe, tmp_path / "many", "--format", "w4a16", *NEAREST, "--max-shard-size", "200KB", "--workers", 3)
        == 0
    )
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 4
    found = {}
    for file in set(index.values()):
        found |= load_file(tmp_path / "many" / file)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert found.keys() == expected.keys() == index.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_all_formats_and_their_table(moe, tmp_path, capsys):
    assert quantize(moe, tmp_path / "out", "--all", *NEAREST) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "gguf", *SAFETENSORS_FORMATS}
    table = (tmp_path / "out" / "README.md").read_text()
    assert all(f"[{name}]({name})" in table for name in SAFETENSORS_FORMATS)
    assert all(f"[gguf](gguf) | GGUF, {kind}" in table for kind in GGUF_KINDS)
    said = capsys.readouterr().out
    names = [*SAFETENSORS_FORMATS, *(f"gguf:{kind}" for kind in GGUF_KINDS)]
    assert all(f"{name} by nearest" in said for name in names)
    before = hashes(tmp_path / "out")
    assert quantize(moe, tmp_path / "out", "--all", *NEAREST) == 0
    assert capsys.readouterr().out.count("already complete") == len(names)
    assert hashes(tmp_path / "out") == before


def test_options_of_formats(hf, tmp_path):
    words = (
        "--format",
        "gptq-int4,fp8",
        *NEAREST,
        "--asymmetric",
        "--group-size",
        64,
        "--fp8-blocks",
        "--dtype",
        "bf16",
    )
    assert quantize(hf, tmp_path / "out", *words) == 0
    gptq, fp8 = (json.loads((tmp_path / "out" / name / "config.json").read_text()) for name in ("gptq-int4", "fp8"))
    stated = gptq["quantization_config"]
    assert (stated["checkpoint_format"], stated["group_size"], stated["sym"]) == ("gptq_v2", 64, False)
    assert gptq.get("dtype", gptq.get("torch_dtype")) == "bfloat16"
    group = fp8["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["block_structure"] == [128, 128]


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (("--format", "gptq-in4"), 2, "Did you mean gptq-int4?"),
        (("--format", "fp8,fp8"), 2, "named twice"),
        ((), 2, "name formats"),
        (("--format", "fp8", "--all"), 2, "one of the two"),
        (("--format", "gptq-int4"), 2, "--method nearest"),
        (("--format", "fp8", "--method", "awq", "--calibrate", "texts"), 2, "makes the values of awq-int4, w4a16"),
        (("--format", "fp8", "--method", "gptq"), 2, "2 problems"),
        (("--format", "fp8,gptq-int4,w8a8"), 2, "name texts (--calibrate FILE)"),
        (("--format", "gguf:Q8_0", "--importance"), 2, "name texts (--calibrate FILE)"),
        (("--format", "fp8", "--importance"), 2, "option of GGUF"),
        (("--format", "w4a16", "--calibrate", "none.txt"), 3, "none.txt"),
        (("--format", "fp8", "--asymmetric"), 2, "option of gptq"),
        (("--format", "gptq-int4", "--act-order", *NEAREST), 2, "importance of inputs"),
        (("--format", "w8a8", "--fp8-blocks", *NEAREST), 2, "option of fp8"),
        (("--format", "fp8", "--pad-ffn", "100"), 2, "padding only adds"),
        (("--format", "fp8", "--iteration", "3"), 2, "describes itself"),
        (("--format", "fp8", "--workers", "0"), 2, "at least 1"),
        (("--format", "fp8", "--max-shard-size", "none"), 2, "must be a size"),
    ],
)
def test_refused_options(words, exit_code, said, hf, tmp_path):
    assert said in refused("quantize", hf, tmp_path / "out", *words, exit_codes=(exit_code,))
    assert not list(tmp_path.iterdir())


def test_an_occupied_place(hf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "not empty" in refused("quantize", hf, tmp_path / "out", "--format", "fp8", exit_codes=(3,))
    said = refused("quantize", hf, tmp_path / "out", "--format", "fp8,fp8-block", exit_codes=(3,))
    assert "other things than releases (mine.txt)" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_source_that_is_quantized_already(hf, tmp_path):
    assert quantize(hf, tmp_path / "fp8", "--format", "fp8") == 0
    said = refused("quantize", tmp_path / "fp8", tmp_path / "out", "--format", "w8a8", *NEAREST, exit_codes=(3,))
    assert "compressed-tensors: its weights are quantized already" in said
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    said = refused("quantize", tmp_path / "model.gguf", tmp_path / "out", "--format", "fp8", exit_codes=(3,))
    assert "GGUF file" in said


def test_a_shape_that_does_not_fit(tmp_path):
    from tests.checkpoints_convert.models import make

    hf = make("qwen2 odd", tmp_path / "hf")  # widths of 48, 72 and 160
    said = refused("quantize", hf, tmp_path / "out", "--format", "fp8,gptq-int4,w4a16", *NEAREST, exit_codes=(3,))
    assert said.count("down_proj") == 2, "once a format, not once a layer"
    assert "--pad-ffn auto" in said
    assert "w8a8" in said
    assert not (tmp_path / "out").exists()
    assert quantize(hf, tmp_path / "out", "--format", "fp8,w8a8,fp8-block", *NEAREST) == 0


def test_values_that_are_too_large(hf, tmp_path):
    """fp16 ends at 65,504: the norms of GPTQ and AWQ releases are fp16."""
    from safetensors.torch import save_file

    shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    words = ("quantize", tmp_path / "hf", tmp_path / "out", *NEAREST, "--format", "gptq-int4")
    assert "choose bf16 or fp32" in refused(*words, exit_codes=(3,))
    assert quantize(*words[1:], "--dtype", "bf16") == 0
