"""Broken or hostile Hugging Face directories are refused: exit code 3, everything in one message, nothing written."""

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.convert import main
from tests.checkpoint.test_metadata import crafted
from tests.checkpoints_convert.refusal import CANARY, assert_untouched, refused
from tests.conftest import run


def shards(hf: Path) -> list[Path]:
    return sorted(hf.glob("model-*.safetensors"))


def edit_shard(hf: Path, change: Callable[[dict[str, torch.Tensor]], Any], number: int = 1) -> str:
    """Writes a shard again with other tensors, and the index to fit; the name of its first tensor."""
    path = shards(hf)[number]
    tensors = load_file(path)
    first = sorted(tensors)[0]
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index = read_index(hf)
    kept = {name: file for name, file in index["weight_map"].items() if file != path.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, path.name)
    write_index(hf, index)
    return first


def read_index(hf: Path) -> dict[str, Any]:
    return json.loads((hf / "model.safetensors.index.json").read_text())


def write_index(hf: Path, index: dict[str, Any]) -> None:
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any] | None = None, text: bytes | None = None) -> None:
    """Replaces the header of a shard; the values stay."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if text is None:
        content = json.loads(data[8 : 8 + length])
        assert change is not None
        change(content)
        text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def redirect(hf: Path, target: str) -> None:
    index = read_index(hf)
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = target
    write_index(hf, index)


def duplicate_in_header(hf: Path) -> None:
    path = shards(hf)[0]
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].decode().strip()
    name = next(key for key in json.loads(text) if key != "__metadata__")
    described = json.dumps(json.loads(text)[name])
    edit_header(path, text=(text[:-1] + f', "{name}": {described}}}').encode())


def link_out(hf: Path) -> None:
    path = shards(hf)[0]
    path.rename(hf.parent / "elsewhere.safetensors")
    path.symlink_to(hf.parent / "elsewhere.safetensors")


def many_tensors(hf: Path) -> None:
    tensors = {f"model.layers.{number}.x": torch.zeros(1, dtype=torch.bfloat16) for number in range(20_000)}
    for path in shards(hf):
        path.unlink()
    (hf / "model.safetensors.index.json").unlink()
    save_file(tensors, hf / "model.safetensors")


def only_pickles(hf: Path) -> None:
    for path in [*shards(hf), hf / "model.safetensors.index.json"]:
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(crafted(os.system, f"touch {hf.parent / CANARY}"))


def twice(hf: Path) -> None:
    one, other = shards(hf)[:2]
    tensors = load_file(other)
    name = sorted(load_file(one))[0]
    save_file(tensors | {name: load_file(one)[name]}, other, metadata={"format": "pt"})


HF: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing shard": (lambda hf: shards(hf)[1].unlink(), ["is missing"]),
    "key in two shards": (twice, ["another file too"]),
    "key twice in a header": (duplicate_in_header, ["twice in the header"]),
    "extra key": (
        lambda hf: edit_shard(hf, lambda found: found.update(bogus=torch.zeros(2, dtype=torch.bfloat16))),
        ["bogus", "do not belong"],
    ),
    "missing key": (lambda hf: edit_shard(hf, lambda found: found.pop(sorted(found)[0])), ["are missing"]),
    "wrong shape": (
        lambda hf: edit_shard(hf, lambda found: found.update({sorted(found)[0]: torch.zeros(3, dtype=torch.bfloat16)})),
        ["has the shape [3]"],
    ),
    "wrong format": (
        lambda hf: edit_shard(hf, lambda found: found.update({sorted(found)[0]: found[sorted(found)[0]].float()})),
        ["torch.float32", "--dtype"],
    ),
    "integer format": (
        lambda hf: edit_shard(hf, lambda found: found.update({sorted(found)[0]: found[sorted(found)[0]].int()})),
        ["torch.int32"],
    ),
    "index leads up": (lambda hf: redirect(hf, "../hf/model.safetensors"), ["not the bare name"]),
    "index with an absolute path": (lambda hf: redirect(hf, "/etc/passwd"), ["not the bare name", "/etc/passwd"]),
    "index with NUL": (lambda hf: redirect(hf, "model\0.safetensors"), ["not the bare name"]),
    "index with a backslash": (lambda hf: redirect(hf, "..\\model.safetensors"), ["not the bare name"]),
    "index with a dot": (lambda hf: redirect(hf, ".."), ["not the bare name"]),
    "index with a number": (lambda hf: redirect(hf, 7), ["not the bare name"]),  # type: ignore[arg-type]
    "link that leads out": (link_out, ["link that leads out"]),
    "20,000 tensors": (many_tensors, ["20000", "do not belong"]),
    "truncated shard": (lambda hf: shards(hf)[0].write_bytes(shards(hf)[0].read_bytes()[:-1]), ["cut off or changed"]),
    "longer shard": (lambda hf: shards(hf)[0].write_bytes(shards(hf)[0].read_bytes() + b"\0"), ["cut off or changed"]),
    "empty shard": (lambda hf: shards(hf)[0].write_bytes(b""), ["no safetensors file"]),
    "huge header length": (
        lambda hf: shards(hf)[0].write_bytes(b"\xff" * 8 + shards(hf)[0].read_bytes()[8:]),
        ["no safetensors file"],
    ),
    "header is no JSON": (lambda hf: edit_header(shards(hf)[0], text=b"{" * 64), ["header that cannot be read"]),
    "header is endlessly nested": (
        lambda hf: edit_header(shards(hf)[0], text=b'{"a":' + b"[" * 200_000),
        ["header that cannot be read"],
    ),
    "overlapping tensors": (
        lambda hf: edit_header(
            shards(hf)[1],
            lambda content: content.update({name: content[sorted(content)[1]] for name in sorted(content)[1:3]}),
        ),
        ["overlaps"],
    ),
    "negative offset": (
        lambda hf: edit_header(shards(hf)[1], lambda content: content[sorted(content)[1]].update(data_offsets=[-2, 0])),
        ["described wrongly"],
    ),
    "offsets that are no numbers": (
        lambda hf: edit_header(
            shards(hf)[1], lambda content: content[sorted(content)[1]].update(data_offsets=["a", 0])
        ),
        ["described wrongly"],
    ),
    "unknown format": (
        lambda hf: edit_header(shards(hf)[1], lambda content: content[sorted(content)[1]].update(dtype="F8_E4M3")),
        ["F8_E4M3"],
    ),
    "pickled weights only": (only_pickles, ["pytorch_model.bin", "save_pretrained"]),
    "no config": (lambda hf: (hf / "config.json").unlink(), ["config.json", "is missing"]),
    "config is no JSON": (lambda hf: (hf / "config.json").write_text("{"), ["config.json", "not a JSON object"]),
    "config is a list": (lambda hf: (hf / "config.json").write_text("[]"), ["config.json", "not a JSON object"]),
    "index is no JSON": (
        lambda hf: (hf / "model.safetensors.index.json").write_text("nonsense"),
        ["index.json", "not a JSON object"],
    ),
    "index without a map": (lambda hf: write_index(hf, {"metadata": {}}), ["weight_map"]),
}


@pytest.mark.parametrize("name", HF)
def test_huggingface_directory(name, hf, tmp_path):
    change, expected = HF[name]
    change(hf)
    message = refused("from-hf", hf, tmp_path / "out")
    assert all(word in message for word in expected), message
    assert_untouched(tmp_path)


REQUIRED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)


@pytest.mark.parametrize("field", REQUIRED)
def test_config_without_a_field(field, hf, tmp_path):
    content = json.loads((hf / "config.json").read_text())
    del content[field]
    (hf / "config.json").write_text(json.dumps(content))
    message = refused("from-hf", hf, tmp_path / "out", exit_codes=(3,))
    assert field in message or (field == "rope_parameters" and "rope_theta" in message)
    assert_untouched(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": -1}, "at least 1"),
        ({"num_hidden_layers": "3"}, "whole number"),
        ({"num_hidden_layers": True}, "whole number"),
        ({"hidden_size": 1 << 70}, "has the shape"),
        ({"rms_norm_eps": float("nan")}, "finite"),
        ({"rms_norm_eps": 0}, "greater than 0"),
        ({"num_key_value_heads": 3}, "must be divisible by"),
        ({"model_type": "llama"}, "supported model types: qwen2,"),
        ({"model_type": ["qwen2"]}, "supported model types: qwen2,"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"rope_scaling": {"type": "yarn"}}, "is not supported"),
        ({"use_sliding_window": True}, "is not supported"),
        ({"layer_types": ["sliding_attention"] * 3}, "full_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is not supported"),
        ({"hidden_act": "gelu"}, "must be silu"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
    ],
)
def test_config_that_cannot_be(changes, expected, hf, tmp_path):
    content = json.loads((hf / "config.json").read_text()) | changes
    (hf / "config.json").write_text(json.dumps(content))
    message = refused("from-hf", hf, tmp_path / "out", exit_codes=(3,))
    assert expected in message, message
    assert_untouched(tmp_path)


def test_all_that_is_wrong_is_said_at_once(hf, tmp_path):
    shards(hf)[0].unlink()
    shards(hf)[1].write_bytes(b"")
    redirect(hf, "/etc/passwd")
    content = json.loads((hf / "config.json").read_text())
    del content["rms_norm_eps"]
    content["hidden_act"] = "gelu"
    (hf / "config.json").write_text(json.dumps(content))
    message = refused("from-hf", hf, tmp_path / "out")
    for word in ("00001-of", "no safetensors file", "/etc/passwd", "rms_norm_eps", "hidden_act"):
        assert word in message, message


@pytest.mark.parametrize("kind", ["file in it", "a file", "a link"])
@pytest.mark.parametrize("action", ["to-hf", "from-hf"])
def test_out_is_occupied(action, kind, hf, finished_run, tmp_path):
    out = tmp_path / "out"
    if kind == "file in it":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif kind == "a file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert "already exists" in refused(action, finished_run if action == "to-hf" else hf, out, exit_codes=(3,))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_empty_directory_is_no_obstacle(hf, tmp_path):
    (tmp_path / "out").mkdir()
    assert main(["from-hf", str(hf), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "run.yaml").is_file()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "special_tokens_map.json"])
def test_a_link_to_a_file_of_somebody_else(name, hf, tmp_path):
    (tmp_path / "secret").write_text((hf / "config.json").read_text())
    (hf / name).unlink(missing_ok=True)
    (hf / name).symlink_to(tmp_path / "secret")
    message = refused("from-hf", hf, tmp_path / "out", exit_codes=(3,))
    assert "link that leads out" in message
    assert name in message
    assert_untouched(tmp_path)


def test_sizes_beyond_all_bounds_are_refused_at_once(hf, tmp_path):
    for changes in ({"num_hidden_layers": 10**9}, {"num_attention_heads": 5 * 10**8, "num_key_value_heads": 5 * 10**8}):
        content = json.loads((hf / "config.json").read_text()) | changes
        (hf / "config.json").write_text(json.dumps(content))
        assert "larger than any supported model" in refused("from-hf", hf, tmp_path / "out", exit_codes=(3,))


@pytest.mark.parametrize("extra", [{"note": 2**80}, {"note": "\ud800"}, {"auto_map": {"AutoModel": "evil.py"}}])
def test_what_config_json_holds_beside_is_harmless(extra, hf, tmp_path):
    content = json.loads((hf / "config.json").read_text()) | extra | {"attn_implementation": "evil/kernel"}
    (hf / "config.json").write_text(json.dumps(content))
    assert main(["from-hf", str(hf), str(tmp_path / "out")]) == 0
    assert main(["verify", str(hf), str(tmp_path / "out"), "--logits"]) == 0


def test_the_program_itself_ends_with_the_code_and_no_traceback(hf, tmp_path):
    shards(hf)[0].unlink()
    done = run("checkpoints_convert.convert", "from-hf", hf, tmp_path / "out")
    assert done.returncode == 3
    assert done.stderr.startswith("conversion error")
    assert "Traceback" not in done.stderr
    nothing = run("checkpoints_convert.convert", "to-hf", tmp_path / "nothing", tmp_path / "out")
    assert nothing.returncode == 4
    wrong = run("checkpoints_convert.convert", "to-hf", hf, tmp_path / "out", "--max-shard-size", "5 parsec")
    assert wrong.returncode == 2
    assert "5 parsec" in wrong.stderr
    assert io.StringIO(wrong.stderr).read().count("\n") == 1
