"""A model against its quantized release: what a method may do passes, what is wrong with a release is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.convert import main
from checkpoints_convert.from_hf import ImportOptions, convert
from tests.checkpoints_convert.dequantize import written
from tests.checkpoints_convert.dequantize.written import Codes, Written, source_model, write

WAYS = {
    "gptq": Written("gptq"),
    "gptq 8": Written("gptq", bits=8),
    "gptq_v2 act-order asymmetric": Written("gptq", version="gptq_v2", symmetric=False, act_order=True),
    "awq": Written("awq", symmetric=False),
    "pack": Written("pack"),
    "pack channel": Written("pack", strategy="channel"),
    "pack act-order asymmetric": Written("pack", act_order=True, symmetric=False),
    "int8": Written("int8", bits=8, strategy="channel"),
    "fp8 channel": Written("fp8", strategy="channel"),
    "fp8 tensor": Written("fp8", strategy="tensor"),
    "fp8 block": Written("fp8", strategy="block"),
    "fp8-block": Written("fp8-block"),
}
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8, "head_dim": 16}


def verdict(capsys: Any, *words: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["verify", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_model(tmp_path_factory.mktemp("source") / "hf", **SIZES, num_key_value_heads=4)


def with_fields(how: Written, **fields: Any) -> Written:
    return Written(**{**vars(how), **fields})


@pytest.mark.parametrize("name", WAYS)
def test_nearest_passes_with_logits(name: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    write(source, tmp_path / "out", WAYS[name])
    code, found = verdict(capsys, source, tmp_path / "out", "--logits")
    logits, weights = found["logits"], found["quantized"]
    assert code == 0, found["worst"]
    assert weights["weights"] == 14
    assert 0 < logits["kl_mean"] <= logits["kl_tolerance"]
    assert [side["bits_per_weight"] < 16 for side in found["sides"]] == [False, True]
    assert found["equal_tensors"] == found["tensors"] - 14
    # Either may be the reference, and a release is the same as itself.
    assert verdict(capsys, tmp_path / "out", source)[0] == 0
    code, found = verdict(capsys, tmp_path / "out", tmp_path / "out")
    assert (code, found["equal_tensors"]) == (0, found["tensors"])
    print(f"{name}: KL {logits['kl_mean']:.2e}, worst {logits['kl_worst']:.2e}, top-1 {logits['top1_agreement']:.3f}, "
          f"rms {logits['rms']:.2f}, error {weights['relative_error']:.4f}")  # fmt: skip


def test_against_a_checkpoint(source: Path, tmp_path: Path, capsys: Any) -> None:
    """The other side in megatron-core's modules."""
    convert(source, tmp_path / "start", ImportOptions(quiet=True))
    write(source, tmp_path / "out", WAYS["pack"])
    code, found = verdict(capsys, tmp_path / "start", tmp_path / "out", "--logits")
    assert code == 0, found["worst"]
    assert found["quantized"]["precision"] == "int4"


def compensated(weight: np.ndarray, *, bits: int, group: int, symmetric: bool, group_of: Any = None) -> Codes:
    """GPTQ on inputs that are strongly correlated: errors go to the columns that come later."""
    columns = weight.shape[1]
    draw = np.random.default_rng(columns)
    inputs = draw.normal(size=(columns, columns // 4)) @ draw.normal(size=(columns // 4, 2048))
    inputs += 0.3 * draw.normal(size=inputs.shape) * np.exp(draw.normal(size=(columns, 1)))
    hessian = 2 * inputs @ inputs.T
    hessian[np.diag_indices(columns)] += 0.01 * np.diag(hessian).mean()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    found = _nearest(weight, bits=bits, group=group, symmetric=symmetric, group_of=group_of)
    left = weight.astype(np.float64)
    for column in range(columns):
        of = found.group_of[column]
        scale, zero = found.scales[:, of].astype(np.float64), found.zeros[:, of]
        found.codes[:, column] = np.clip(np.rint(left[:, column] / scale) + zero, 0, (1 << bits) - 1)
        error = (left[:, column] - (found.codes[:, column] - zero) * scale) / upper[column, column]
        left[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    return found


_nearest = written.nearest


@pytest.mark.parametrize("name", ["gptq", "gptq 8", "gptq_v2 act-order asymmetric", "awq", "pack", "int8"])
def test_compensated_errors_pass(
    name: str, source: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "nearest", compensated)
    write(source, tmp_path / "out", WAYS[name])
    code, found = verdict(capsys, source, tmp_path / "out")
    worst = found["quantized"]["worst"][0]
    print(name, worst)
    assert code == 0, found["worst"]
    assert worst["ratio"] > 1.2, "nothing was compensated"


def shift_zeros(codes: Codes) -> None:
    codes.zeros += 1


def another_order(codes: Codes) -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes.codes[:] = codes.codes.reshape(codes.codes.shape[0], -1, 8)[:, :, order].reshape(codes.codes.shape)


def scales_of_the_next_row(codes: Codes) -> None:
    codes.scales[:] = np.roll(codes.scales, 1, 0)


def scales_of_the_next_group(codes: Codes) -> None:
    codes.scales[:] = np.roll(codes.scales, 1, 1)


def no_scales(codes: Codes) -> None:
    codes.scales[:] = 1


def half_the_scales(codes: Codes) -> None:
    codes.scales /= 2


def permuted_groups(codes: Codes) -> None:
    codes.group_of[:] = np.random.default_rng(5).permutation(codes.group_of)


def another_group(codes: Codes) -> None:
    """Scales of groups twice as wide, as if the codes were of those."""
    codes.scales[:] = codes.scales[:, np.arange(codes.scales.shape[1]) // 2]


WITH_ZEROS = [name for name, how in WAYS.items() if not how.symmetric]
GROUPED = ["gptq", "gptq 8", "gptq_v2 act-order asymmetric", "awq", "pack", "pack act-order asymmetric"]
INTEGERS = [*GROUPED, "pack channel", "int8"]
WRONG: dict[str, tuple[Callable[[Codes], None], list[str]]] = {
    "zeros off by one": (shift_zeros, WITH_ZEROS),
    "order of the codes": (another_order, INTEGERS),
    "scales of the next row": (scales_of_the_next_row, INTEGERS),
    "scales of the next group": (scales_of_the_next_group, GROUPED),
    "no scales": (no_scales, INTEGERS),
    "half the scales": (half_the_scales, INTEGERS),
    "permuted g_idx": (permuted_groups, [name for name, how in WAYS.items() if how.act_order]),
    "another group size": (another_group, GROUPED),
}


@pytest.mark.parametrize(("wrong", "name"), [(wrong, name) for wrong, (_, names) in WRONG.items() for name in names])
def test_what_is_wrong_is_found(wrong: str, name: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    write(source, tmp_path / "out", with_fields(WAYS[name], tamper=WRONG[wrong][0]))
    code, found = verdict(capsys, source, tmp_path / "out")
    print(name, wrong, found["worst"][0]["detail"] if found["worst"] else found["quantized"]["worst"])
    assert code == 1
    # Factors of v_proj and up_proj may be undone in o_proj and down_proj: then those two are named.
    folding = not name.startswith("gptq")
    assert found["differences"] >= 10 if folding else found["differences"] == 14, "every weight is wrong"


@pytest.mark.parametrize("name", [name for name in WAYS if name.startswith("fp8")])
def test_scales_of_fp8(name: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    for change in (lambda scale: scale * 1.1, lambda scale: 1 / scale, torch.ones_like):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write(source, tmp_path / "out", WAYS[name])
        path = tmp_path / "out" / "model.safetensors"
        tensors = load_file(path)
        for one in [one for one in tensors if "scale" in one]:
            tensors[one] = change(tensors[one]).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        code, found = verdict(capsys, source, tmp_path / "out")
        assert (code, found["differences"]) == (1, 14), (name, found["quantized"]["worst"][0])


def test_one_row_of_one_weight(source: Path, tmp_path: Path, capsys: Any) -> None:
    """A fault of a single row is not lost in the mean of the weight."""
    write(source, tmp_path / "out", WAYS["gptq"])
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.gate_proj"
    tensors[f"{name}.qweight"][:, 7] = tensors[f"{name}.qweight"][:, 8]
    save_file(tensors, path, metadata={"format": "pt"})
    code, found = verdict(capsys, source, tmp_path / "out")
    assert (code, [item["name"] for item in found["worst"]]) == (1, [f"{name}.weight"])


def test_what_is_not_quantized_is_compared_as_before(source: Path, tmp_path: Path, capsys: Any) -> None:
    write(source, tmp_path / "out", WAYS["gptq"])
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3, 5] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    code, found = verdict(capsys, source, tmp_path / "out")
    assert (code, [item["name"] for item in found["worst"]]) == (1, ["model.embed_tokens.weight"])
    assert "tolerance 0.00390625" in found["worst"][0]["detail"]


def test_in_words(source: Path, tmp_path: Path, capsys: Any) -> None:
    write(source, tmp_path / "out", WAYS["pack"])
    assert main(["verify", str(source), str(tmp_path / "out"), "--logits"]) == 0
    text = capsys.readouterr().out
    for words in ("14 quantized weights (compressed-tensors, int4", "bits a weight", "KL divergence", "perplexity"):
        assert words in text, text
