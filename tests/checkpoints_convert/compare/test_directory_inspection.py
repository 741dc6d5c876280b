"""Inspection of Hugging Face directories, quantized or not."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints_convert.convert import main
from tests.checkpoints_convert.dequantize.written import Written, source_model, write
from tests.checkpoints_convert.refusal import refused


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_model(tmp_path_factory.mktemp("source") / "hf", "qwen2_moe")


def inspected(capsys: Any, path: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_directory_that_is_not_quantized(source: Path, capsys: Any) -> None:
    found = inspected(capsys, source)
    assert (found["quantization"], found["bits_per_weight"], found["model_type"]) == (None, 16.0, "qwen2_moe")
    assert found["bytes"] == sum(part["size"] for part in found["parts"])
    assert {part["name"] for part in found["parts"]} >= {"router", "routed experts", "shared expert", "norms"}


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        # Codes, and for 32 values a float16 scale and a packed zero; weight_shape and row scales are the rest.
        (Written("pack"), 4 + 16 / 32),
        (Written("awq", symmetric=False), 4 + 16 / 32 + 4 / 32),
        (Written("int8", bits=8, strategy="channel"), 8),
    ],
)
def test_bits_of_quantized_weights(how: Written, bits: float, source: Path, tmp_path: Path, capsys: Any) -> None:
    write(source, tmp_path / "out", how)
    found = inspected(capsys, tmp_path / "out")
    assert found["quantized"]["bits_per_weight"] == pytest.approx(bits, abs=0.5)
    assert found["quantized"]["bits_per_weight"] >= bits
    assert found["bits_per_weight"] < 16
    assert found["quantization"]["precision"] == f"int{how.bits}"
    assert sum(row["quantized"] for row in found["tensors"]) == 2 * (4 + 3 + 3 * 4)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "bits a weight" in text
    assert f"int{how.bits}" in text


def test_what_cannot_be_read(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", Written("pack", settings={"quant_method": "bitsandbytes"}))
    assert "supported: gptq, awq, compressed-tensors, fp8" in refused("inspect", tmp_path / "out", exit_codes=(3,))
    assert "has no iterations" in refused("inspect", source, "--iteration", "3", exit_codes=(2,))
