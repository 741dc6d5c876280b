"""Verification finds what differs, and only that."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.compare.logits import TOLERANCE
from checkpoints_convert.convert import main
from checkpoints_convert.from_hf import ImportOptions, convert
from megatron_qwen.checkpoint.paths import iteration_dir
from megatron_qwen.hf.config import architecture_from_hf
from megatron_qwen.hf.mapping import hf_tensors
from tests.checkpoints_convert.models import MODELS, make, with_tokenizer


def verdict(capsys: Any, *words: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["verify", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def released(finished_run, tmp_path_factory):
    """A run and its export."""
    out = tmp_path_factory.mktemp("released") / "hf"
    assert main(["to-hf", str(finished_run), str(out), "--json"]) == 0
    return finished_run, out


@pytest.fixture
def changed(released, tmp_path):
    """A copy of the export, to be changed."""
    shutil.copytree(released[1], tmp_path / "changed")
    return tmp_path / "changed"


def rewrite(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_all_pairs_of_kinds_agree(released, capsys):
    run_dir, hf = released
    manifest = hf / "manifest.json"
    for a, b in (
        (run_dir, hf),
        (hf, run_dir),
        (run_dir, manifest),
        (hf, manifest),
        (manifest, manifest),
        (run_dir, run_dir),
    ):
        code, found = verdict(capsys, a, b)
        assert (code, found["same"], found["tensors"], found["equal_tensors"]) == (0, True, 51, 51), (a, b)


NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize("against", ["run", "hf", "manifest"])
def test_one_bit(against, released, changed, capsys):
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME].view(torch.int32)[5, 7] ^= 1

    rewrite(changed, flip)
    other = {"run": released[0], "hf": released[1], "manifest": released[1] / "manifest.json"}[against]
    code, found = verdict(capsys, other, changed)
    assert code == 1
    assert {item["name"] for item in found["worst"]} == {NAME} | (
        {"model.safetensors"} if against == "manifest" else set()
    )
    assert found["equal_tensors"] == 50
    if against != "manifest":
        assert "1 of 8,192 values" in found["worst"][0]["detail"]


def test_minus_zero_is_not_zero_and_nan_is_itself(changed, tmp_path, capsys):
    def special(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME][0, :3] = torch.tensor([0.0, float("nan"), float("inf")])

    rewrite(changed, special)
    shutil.copytree(changed, tmp_path / "other")
    assert verdict(capsys, changed, tmp_path / "other")[0] == 0
    rewrite(tmp_path / "other", lambda tensors: tensors[NAME].__setitem__((0, 0), -0.0))
    code, found = verdict(capsys, changed, tmp_path / "other")
    assert code == 1
    assert found["worst"][0]["name"] == NAME


def test_formats_are_compared_over_more_than_one_block(tmp_path, capsys):
    """Rows of both sides must go together, whatever they take of a block."""
    content = json.loads((make("qwen2 odd tied", tmp_path / "small") / "config.json").read_text())
    model = architecture_from_hf(content | {"vocab_size": 200_000}, where="config.json").model
    for dtype in (torch.float32, torch.bfloat16):
        directory = tmp_path / str(dtype)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(content | {"vocab_size": 200_000}))
        torch.manual_seed(1)
        tensors = {item.name: torch.randn(item.shape).to(dtype) for item in hf_tensors(model)}
        save_file(tensors, directory / "model.safetensors")
    sides = (tmp_path / "torch.float32", tmp_path / "torch.bfloat16")
    assert verdict(capsys, *sides, "--tolerance", 2**-8)[0] == 0
    assert verdict(capsys, *sides, "--tolerance", 1e-4)[0] == 1


def test_only_the_sign_of_a_zero(changed, tmp_path, capsys):
    rewrite(changed, lambda tensors: tensors[NAME].__setitem__((0, 0), 0.0))
    shutil.copytree(changed, tmp_path / "other")
    rewrite(tmp_path / "other", lambda tensors: tensors[NAME].__setitem__((0, 0), -0.0))
    code, found = verdict(capsys, changed, tmp_path / "other")
    assert (code, found["equal_tensors"]) == (1, found["tensors"] - 1)


def test_the_worst_ten_are_named_worst_first(released, changed, capsys):
    def scale(tensors: dict[str, torch.Tensor]) -> None:
        for number, name in enumerate(sorted(tensors)):
            tensors[name] *= 1 + (number + 1) / 1000

    rewrite(changed, scale)
    code, found = verdict(capsys, released[1], changed)
    sizes = [item["size"] for item in found["worst"]]
    assert (code, len(sizes), found["differences"]) == (1, 10, 51)
    assert sizes == sorted(sizes, reverse=True)
    assert main(["verify", str(released[1]), str(changed)]) == 1
    assert "and 41 more" in capsys.readouterr().out


def test_a_stated_tolerance(finished_run, tmp_path, capsys):
    for dtype in ("fp32", "bf16"):
        assert main(["to-hf", str(finished_run), str(tmp_path / dtype), "--dtype", dtype, "--json"]) == 0
    code, found = verdict(capsys, tmp_path / "fp32", tmp_path / "bf16")
    assert code == 1
    assert "float32 and bfloat16" in found["worst"][0]["detail"]
    assert verdict(capsys, tmp_path / "fp32", tmp_path / "bf16", "--tolerance", 2**-8)[0] == 0
    assert verdict(capsys, tmp_path / "fp32", tmp_path / "bf16", "--tolerance", 1e-4)[0] == 1


def test_a_nan_is_beyond_every_tolerance(released, changed, capsys):
    rewrite(changed, lambda tensors: tensors[NAME].__setitem__((0, 0), float("nan")))
    for sides in ((released[1], changed), (changed, released[1])):
        code, found = verdict(capsys, *sides, "--tolerance", 0.9)
        assert (code, [item["name"] for item in found["worst"]]) == (1, [NAME]), sides


def test_configuration_and_tokenizer(released, changed, capsys):
    content = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(content | {"rope_theta": 5000.0, "rms_norm_eps": 1e-5}))
    (changed / "tokenizer_config.json").write_text("{}")
    (changed / "vocab.json").write_text("{}")
    code, found = verdict(capsys, released[0], changed)
    assert code == 1
    assert {(item["kind"], item["name"]) for item in found["worst"]} == {
        ("configuration", "rope_theta"),
        ("configuration", "rms_norm_eps"),
        ("tokenizer", "tokenizer_config.json"),
        ("tokenizer", "vocab.json"),
    }


@pytest.mark.parametrize("broken", [{"added_tokens": []}, {"model": None}])
def test_equal_directories_are_the_same_whatever_their_tokenizer(broken, changed, tmp_path, capsys):
    """One without a token that ends documents, one that nothing loads: both sides are the same all the same."""
    content = json.loads((changed / "tokenizer.json").read_text())
    (changed / "tokenizer.json").write_text(json.dumps(content | broken))
    shutil.copytree(changed, tmp_path / "copy")
    assert verdict(capsys, changed, tmp_path / "copy")[0] == 0


def test_says_that_no_tokenizer_was_loaded_without_transformers(released, capsys, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert verdict(capsys, *released)[0] == 0
    assert "the tokenizer was not loaded as its users will load it: transformers is not installed" in caplog.text


def test_files_of_a_released_directory(released, changed, capsys):
    (changed / "README.md").write_text("another card")
    (changed / "more.txt").write_text("")
    code, found = verdict(capsys, changed, changed / "manifest.json")
    assert code == 1
    assert {item["name"] for item in found["worst"]} == {"README.md", "more.txt"}


def test_two_checkpoints_of_a_run_differ(finished_run, capsys):
    root = finished_run / "checkpoints"
    code, found = verdict(capsys, iteration_dir(root, 4), iteration_dir(root, 8))
    assert code == 1
    assert found["equal_tensors"] < found["tensors"]


def test_logits_of_the_release(released, capsys):
    code, found = verdict(capsys, *released, "--logits", "--prompt", "def main(argv):\n    return 0\n")
    logits = found["logits"]
    print(f"release: {logits['max_abs_difference']:.1e} of rms {logits['rms']:.2f}")
    assert code == 0
    assert logits["passes"]
    assert logits["max_abs_difference"] <= 1e-4
    assert logits["top1_agreement"] == 1.0
    code, found = verdict(capsys, *released, "--logits", "--dtype", "bf16")
    assert (code, found["logits"]["dtype"]) == (0, "bf16")
    assert found["logits"]["tolerance"] >= TOLERANCE["bf16"][0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_architecture(name, tmp_path, capsys):
    """megatron-core's modules against transformers', weights whose logits differ from token to token."""
    original = make(name, tmp_path / "hf", dtype=torch.float32, loud=True)
    convert(original, tmp_path / "start", ImportOptions(quiet=True))
    for dtype in ("fp32", "bf16"):
        code, found = verdict(capsys, original, tmp_path / "start", "--logits", "--dtype", dtype)
        logits = found["logits"]
        figures = f"{logits['max_abs_difference']:.1e}, cosine {logits['cosine']:.6f}, rms {logits['rms']:.2f}"
        print(f"{name} {dtype}: {figures}")
        assert logits["rms"] > 0.5, "the logits are all alike: agreement would say nothing"
        assert code == 0
        if dtype == "fp32":
            assert logits["max_abs_difference"] <= 1e-4
            assert logits["top1_agreement"] == 1.0


@pytest.mark.parametrize("change", [{"rope_theta": 60_000.0}, {"rms_norm_eps": 1e-3}, {"norm_topk_prob": True}])
def test_logits_tell_models_apart_that_have_the_same_tensors(change, tmp_path, capsys):
    name = "qwen2_moe odd" if "norm_topk_prob" in change else "qwen3 odd"
    original = make(name, tmp_path / "hf", dtype=torch.float32, loud=True)
    convert(original, tmp_path / "start", ImportOptions(quiet=True))
    content = json.loads((original / "config.json").read_text())
    if "rope_theta" in change:
        content["rope_parameters"] |= change
    else:
        content |= change
    (original / "config.json").write_text(json.dumps(content))
    code, found = verdict(capsys, original, tmp_path / "start", "--logits")
    assert code == 1
    assert found["equal_tensors"] == found["tensors"]
    assert not found["logits"]["passes"]
    assert {item["kind"] for item in found["worst"]} == {"configuration", "logits"}


def test_layer_by_layer_is_the_whole_model(tokenizer, tmp_path):
    """The logits that are compared are those of the whole model, by transformers."""
    from transformers import AutoModelForCausalLM

    from checkpoints_convert.hf_directory import HfDirectory
    from checkpoints_convert.layerwise.layered_hf import HfLayers

    for name in ("qwen2 odd tied", "qwen3_moe odd"):
        source = HfDirectory(with_tokenizer(make(name, tmp_path / name, dtype=torch.float32, loud=True), tokenizer))
        assert source.config is not None
        layers = HfLayers(source, source.config, dtype=torch.float32, place=torch.device("cpu"))
        tokens = torch.arange(50)
        hidden = layers.embed(tokens)
        for index in range(layers.num_layers):
            layers.load_layer(index)
            hidden = layers.layer(hidden)
        logits = layers.final_norm(hidden) @ layers.output_rows(0, layers.vocab_size).t()
        with torch.no_grad():
            whole = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)(tokens[None]).logits[0]
        assert torch.allclose(logits, whole, atol=1e-5)


def test_diff_measures_the_change(finished_run, tmp_path, capsys):
    """Against the norms of the two exports' tensors, by numpy."""
    root = finished_run / "checkpoints"
    for iteration in (4, 8):
        words = ["--iteration", str(iteration), "--json"]
        assert main(["to-hf", str(finished_run), str(tmp_path / str(iteration)), *words]) == 0
    capsys.readouterr()
    a, b = str(iteration_dir(root, 4)), str(iteration_dir(root, 8))
    assert main(["diff", a, b, "--png", str(tmp_path / "diff.png"), "--json"]) == 0
    rows = {(row["layer"], row["part"]): row for row in json.loads(capsys.readouterr().out)}
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("4", "8"))
    name = "model.layers.1.self_attn.o_proj.weight"
    expected = float((second[name] - first[name]).norm() / first[name].norm())
    assert rows["1", "O"]["relative"] == pytest.approx(expected, rel=1e-5)
    assert rows["embedding", "all"]["change"] > 0
    assert len(rows) == 4 * 8 + 3
    assert (tmp_path / "diff.png").read_bytes()[:4] == b"\x89PNG"
