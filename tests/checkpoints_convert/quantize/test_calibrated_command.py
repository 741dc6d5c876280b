"""Calibrated methods through ``mq convert quantize``: from texts to releases that `verify` takes for the model's."""

import json
import shutil
from pathlib import Path

import pytest

from checkpoints_convert.convert import main
from checkpoints_convert.quantize import calibration_request, importance_matrix
from checkpoints_convert.quantize.calibration_request import calibration_folder
from tests.checkpoints_convert.formats.weights import fitting_model
from tests.checkpoints_convert.models import with_tokenizer
from tests.checkpoints_convert.refusal import refused
from tests.checkpoints_convert.test_resume import hashes
from tests.tiers import cases

# With the paper of the method that makes its values.
FORMATS = {"gptq-int4": "2210.17323", "awq-int4": "2306.00978", "w8a8": "2211.10438"}
FEW = ("--samples", 8, "--sample-length", 32)


@pytest.fixture(scope="module", params=cases(["qwen2 fitting"], ["qwen2_moe fitting", "qwen3 fitting tied"]))
def hf(request, tmp_path_factory, tokenizer) -> Path:
    return with_tokenizer(fitting_model(request.param, tmp_path_factory.mktemp("hf") / "small"), tokenizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(f"The number {number} is followed by {number + 1}." for number in range(400)))
    return path


def convert(*words: object) -> int:
    return main([str(word) for word in words])


def test_releases(hf, texts, tmp_path, capsys, monkeypatch):
    wanted = f"{','.join(FORMATS)},gguf:Q4_K_M"
    words = ("quantize", hf, tmp_path / "out", "--format", wanted, "--calibrate", texts, *FEW, "--importance")
    assert convert(*words) == 0
    capsys.readouterr()
    for name, paper in FORMATS.items():
        card = (tmp_path / "out" / name / "README.md").read_text()
        assert f"arxiv.org/abs/{paper}" in card
        assert convert("verify", hf, tmp_path / "out" / name, "--logits", "--json") == 0, capsys.readouterr().out
        capsys.readouterr()
    (file,) = (tmp_path / "out" / "gguf").glob("*.gguf")
    assert convert("verify", hf, file, "--logits") == 0
    assert "with an importance matrix" in (tmp_path / "out" / "README.md").read_text()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    # The same command finds all of it complete, and measures nothing again; other bytes are made of other samples.
    before = hashes(tmp_path / "out" / "gptq-int4")
    capsys.readouterr()
    monkeypatch.delattr(importance_matrix, "importances")
    monkeypatch.delattr(calibration_request, "calibrate")
    assert convert(*words, "--json") == 0
    assert all(one["complete_before"] for one in json.loads(capsys.readouterr().out)["formats"])
    monkeypatch.undo()
    other = ("quantize", hf, tmp_path / "other", "--format", "gptq-int4", "--calibrate", texts, "--samples", 4)
    assert convert(*other, "--sample-length", 32) == 0
    name = "model.safetensors"
    assert hashes(tmp_path / "other")[name] != before[name]


def test_a_release_that_was_begun_keeps_its_layers(hf, texts, tmp_path, capsys):
    words = ("quantize", hf, tmp_path / "out", "--format", "gptq-int4", "--calibrate", texts, *FEW)
    assert convert(*words) == 0
    expected = hashes(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    other = calibration_folder(tmp_path / "out") / "gptq"
    other.mkdir(parents=True)
    (other / "layer-00000.safetensors").write_bytes(b"of what nobody knows")
    assert convert(*words) == 0
    assert hashes(tmp_path / "out") == expected


def test_what_is_refused(hf, texts, tmp_path, capsys):
    where = ("quantize", hf, tmp_path / "out", "--format", "gptq-int4", "--calibrate", texts)
    with pytest.raises(SystemExit, match="2"):
        convert(*where, "--actorder")
    assert "unrecognized arguments: --actorder" in capsys.readouterr().err
    assert "describes itself" in refused(*where, "rope.base=5", exit_codes=(2,))
    assert "positions" in refused(*where, "--sample-length", 10_000_000, exit_codes=(2,))
    assert "damping" in refused(*where, "--damping", 0, exit_codes=(2,))
    assert "512 samples" in refused(*where, exit_codes=(3,))
    assert not list(tmp_path.iterdir())
