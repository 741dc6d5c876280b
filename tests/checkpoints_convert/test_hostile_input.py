"""Broken or hostile input is refused: exit code 3 or 4, everything in one message, nothing written, nothing run."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.convert import main
from checkpoints_convert.from_hf import ImportOptions, convert
from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.metadata import read_metadata
from megatron_qwen.errors import UserError
from tests.checkpoint.test_metadata import _Command as Command
from tests.checkpoint.test_metadata import crafted, torch_saved
from tests.checkpoints_convert.models import make
from tests.conftest import run

CANARY = "canary"


def refused(*words: object, exit_codes: tuple[int, ...] = (3, 4)) -> str:
    """Runs ``mq convert``, which must refuse; its message."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in words])
    assert caught.value.exit_code in exit_codes, caught.value.render()
    return caught.value.render()


def assert_untouched(folder: Path) -> None:
    left = [path.name for path in folder.iterdir() if path.name.startswith((".out", "out", CANARY))]
    assert not left, left


@pytest.fixture(scope="module")
def hf_source(tmp_path_factory):
    return make("qwen2 odd", tmp_path_factory.mktemp("hf") / "hf", max_shard_size="60KB")


@pytest.fixture
def hf(hf_source, tmp_path):
    shutil.copytree(hf_source, tmp_path / "hf")
    return tmp_path / "hf"


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
    tensors = {f"model.layers.{number}.x": torch.zeros(1, dtype=torch.bfloat16) for number in range(100_000)}
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
    "100,000 tensors": (many_tensors, ["100000", "do not belong"]),
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
        ["has the shape", "overlaps"],
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
    "config is no JSON": (lambda hf: (hf / "config.json").write_text("{"), ["config.json", "no JSON object"]),
    "config is a list": (lambda hf: (hf / "config.json").write_text("[]"), ["config.json", "no JSON object"]),
    "index is no JSON": (
        lambda hf: (hf / "model.safetensors.index.json").write_text("nonsense"),
        ["index.json", "no JSON object"],
    ),
    "index without a map": (lambda hf: write_index(hf, {"metadata": {}}), ["weight_map"]),
}


@pytest.mark.parametrize("name", HF)
def test_huggingface_directory(name, hf, tmp_path):
    change, expected = HF[name]
    change(hf)
    message = refused("from-hf", hf, tmp_path / "out")
    assert any(word in message for word in expected[-1:]) or all(word in message for word in expected), message
    if name != "overlapping tensors":
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
        ({"num_key_value_heads": 3}, "must divide by"),
        ({"model_type": "llama"}, "can convert"),
        ({"model_type": ["qwen2"]}, "can convert"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"rope_scaling": {"type": "yarn"}}, "not computed here"),
        ({"use_sliding_window": True}, "not computed here"),
        ({"layer_types": ["sliding_attention"] * 3}, "full_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "not computed here"),
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
    assert "exists already" in refused(action, finished_run if action == "to-hf" else hf, out, exit_codes=(3,))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_empty_directory_is_no_obstacle(hf, tmp_path):
    (tmp_path / "out").mkdir()
    assert main(["from-hf", str(hf), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "run.yaml").is_file()


# Checkpoints.


@pytest.fixture
def checkpoint(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "iter_0000008"


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(bytes(data))


def sign(checkpoint: Path) -> None:
    """Writes the manifest anew, so that only what it describes can give the damage away."""
    entries = {name: manifest.hash_file(checkpoint / name) for name in manifest.files_in(checkpoint)}
    manifest.write(checkpoint, entries, iteration=8, attempt=1)


@pytest.mark.parametrize("at", [0.0, 0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_a_flipped_bit_in_a_shard(at, checkpoint, tmp_path):
    flip(checkpoint / "__0_0.distcp", at)
    message = refused("to-hf", checkpoint, tmp_path / "out", exit_codes=(4,))
    assert "__0_0.distcp" in message
    assert "damaged" in message
    assert_untouched(tmp_path)


def test_every_flipped_bit_is_named(checkpoint, tmp_path):
    for name in ("__0_0.distcp", ".metadata", "tokenizer/tokenizer.json", "generators.safetensors"):
        flip(checkpoint / name, 0.4)
    message = refused("to-hf", checkpoint, tmp_path / "out", exit_codes=(4,))
    for name in ("__0_0.distcp", ".metadata", "tokenizer.json", "generators.safetensors"):
        assert name in message, message
    assert "iteration 4" in message, "the other checkpoint is not offered"
    assert_untouched(tmp_path)


def test_weights_can_be_exported_beside_a_damaged_optimizer_if_that_is_asked_for(checkpoint, tmp_path):
    metadata = read_metadata(checkpoint)
    stored = next(
        info for index, info in metadata.storage_data.items() if index.fqn.startswith("optimizer.state.exp_avg_sq")
    )
    data = bytearray((checkpoint / stored.relative_path).read_bytes())
    data[stored.offset + stored.length // 2] ^= 1
    (checkpoint / stored.relative_path).write_bytes(bytes(data))
    assert "damaged" in refused("to-hf", checkpoint, tmp_path / "out", exit_codes=(4,))
    assert main(["to-hf", str(checkpoint), str(tmp_path / "out"), "--check", "weights"]) == 0


def test_a_damaged_weight_is_refused_even_then(checkpoint, tmp_path):
    metadata = read_metadata(checkpoint)
    for index, stored in metadata.storage_data.items():
        if index.fqn == "decoder.layers.mlp.linear_fc2.weight":
            data = bytearray((checkpoint / stored.relative_path).read_bytes())
            data[stored.offset + stored.length // 2] ^= 1
            (checkpoint / stored.relative_path).write_bytes(bytes(data))
            break
    assert "damaged" in refused("to-hf", checkpoint, tmp_path / "out", "--check", "weights", exit_codes=(4,))
    assert_untouched(tmp_path)


CHECKPOINT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (
        lambda path: (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:-5]),
        "cut off",
    ),
    "missing shard": (lambda path: (path / "__0_0.distcp").unlink(), "is missing"),
    "file that is not noted": (lambda path: (path / "more").write_text(""), "not in the manifest"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "never committed"),
    "no metadata": (lambda path: ((path / ".metadata").unlink(), sign(path)), ".metadata"),
}


@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoint(name, checkpoint, tmp_path):
    change, expected = CHECKPOINT[name]
    change(checkpoint)
    assert expected in refused("to-hf", checkpoint, tmp_path / "out", exit_codes=(4,))
    assert_untouched(tmp_path)


def edit_metadata(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    metadata = read_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(checkpoint)


FC2 = "decoder.layers.mlp.linear_fc2.weight"


def set_stored(metadata: Any, **values: Any) -> None:
    for index, stored in metadata.storage_data.items():
        if index.fqn == FC2:
            for name, value in values.items():
                setattr(stored, name, value)


def shift_slice(metadata: Any) -> None:
    """Has a slice begin where another is, so that the number of values is right and their places are not."""
    chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks
    moved = next(chunk for chunk in chunks if chunk.offsets[1])
    before = moved.offsets
    moved.offsets = torch.Size([moved.offsets[0], moved.offsets[1] - 8, 0])
    for index in list(metadata.storage_data):
        if index.fqn == "decoder.layers.mlp.linear_fc1.weight" and index.offset == before:
            metadata.storage_data[dataclasses.replace(index, offset=moved.offsets)] = metadata.storage_data.pop(index)


METADATA: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tensor gone": (lambda metadata: metadata.state_dict_metadata.pop(FC2), "not in the checkpoint"),
    "tensor more": (
        lambda metadata: metadata.state_dict_metadata.update(more=metadata.state_dict_metadata[FC2]),
        "not in a model",
    ),
    "slice gone": (lambda metadata: metadata.state_dict_metadata[FC2].chunks.pop(), "incomplete"),
    "slice stored nowhere": (
        lambda metadata: [
            metadata.storage_data.pop(index) for index in list(metadata.storage_data) if index.fqn == FC2
        ],
        "stored nowhere",
    ),
    "slice twice": (
        lambda metadata: metadata.state_dict_metadata[FC2].chunks.append(metadata.state_dict_metadata[FC2].chunks[0]),
        "overlap",
    ),
    "slices that overlap and leave a gap": (lambda metadata: shift_slice(metadata), "overlap"),
    "other shape": (
        lambda metadata: setattr(metadata.state_dict_metadata[FC2], "size", torch.Size([4, 64, 64])),
        "outside of it",
    ),
    "path that leads up": (
        lambda metadata: set_stored(metadata, relative_path="../../run.yaml"),
        "outside of the checkpoint",
    ),
    "absolute path": (lambda metadata: set_stored(metadata, relative_path="/etc/passwd"), "outside of the checkpoint"),
    "offset beyond the end": (lambda metadata: set_stored(metadata, offset=1 << 40), "cannot be read"),
    "negative length": (lambda metadata: set_stored(metadata, length=-5), "cannot be read"),
    "another slice's bytes": (lambda metadata: set_stored(metadata, offset=0, length=1261), "cannot be read"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_lies(name, checkpoint, tmp_path):
    change, expected = METADATA[name]
    edit_metadata(checkpoint, change)
    message = refused("to-hf", checkpoint, tmp_path / "out", exit_codes=(4,))
    assert expected in message, message
    assert_untouched(tmp_path)


def test_a_configuration_of_another_shape(checkpoint, tmp_path):
    text = (checkpoint / "run.yaml").read_text()
    (checkpoint / "run.yaml").write_text(text.replace("num_layers: 4", "num_layers: 5").replace("320", "999"))
    sign(checkpoint)
    message = refused("to-hf", checkpoint, tmp_path / "out", exit_codes=(4,))
    assert "5" in message
    assert "has the shape (384, 64) where the configuration says (999, 64)" in message
    assert_untouched(tmp_path)


PAYLOADS = {
    "os.system": lambda canary: crafted(os.system, f"touch {canary}"),
    "posix.system": lambda canary: b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.",
    "eval": lambda canary: crafted(eval, f"open({str(canary)!r}, 'w')"),
    "exec through a nested name": lambda canary: (
        b"ctorch.serialization\nos.system\n(S'touch " + str(canary).encode() + b"'\ntR."
    ),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_pickle_in_metadata(payload, checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(PAYLOADS[payload](tmp_path / CANARY))
    sign(checkpoint)
    assert "Do not load" in refused("to-hf", checkpoint, tmp_path / "out", exit_codes=(4,))
    assert_untouched(tmp_path)


def test_pickle_in_a_shard(checkpoint, tmp_path):
    payload = torch_saved(Command(os.system, f"touch {tmp_path / CANARY}"))
    start = (checkpoint / "__0_0.distcp").stat().st_size
    with (checkpoint / "__0_0.distcp").open("ab") as file:
        file.write(payload)
    edit_metadata(checkpoint, lambda metadata: set_stored(metadata, offset=start, length=len(payload)))
    message = refused("to-hf", checkpoint, tmp_path / "out", exit_codes=(4,))
    assert "posix.system" in message
    assert_untouched(tmp_path)


@pytest.mark.parametrize("payload", ["raw", "archive"])
@pytest.mark.parametrize("where", ["to-hf", "inspect"])
def test_pickle_in_common_pt(where, payload, hf, tmp_path):
    convert(hf, tmp_path / "start", ImportOptions(quiet=True))
    foreign = tmp_path / "start" / "checkpoints" / "iter_0000000"
    for name in ("manifest.json", "run.yaml", "state.json"):
        (foreign / name).unlink()
    canary = tmp_path / CANARY
    content = (
        crafted(os.system, f"touch {canary}")
        if payload == "raw"
        else torch_saved(Command(os.system, f"touch {canary}"))
    )
    (foreign / "common.pt").write_bytes(content)
    words = ("to-hf", foreign, tmp_path / "out", "--config", tmp_path / "start" / "run.yaml")
    message = refused(*(words if where == "to-hf" else ("inspect", foreign)), exit_codes=(4,))
    assert "common.pt" in message
    assert_untouched(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"/tmp/victim.safetensors": None},
        {"../victim.safetensors": None},
        {"README.md": None},
        {".plan.json": None},
        [1],
        {"model.safetensors": 7},
    ],
)
def test_a_checkpoint_names_no_files_but_weights(files, hf, tmp_path):
    """What it notes of the directory it came from decides names here; a forged note is left out of account."""
    convert(hf, tmp_path / "start", ImportOptions(quiet=True))
    forged = tmp_path / "start" / "checkpoints" / "iter_0000000"
    state = json.loads((forged / "state.json").read_text())
    names = [name for group in state["converted_from"]["files"].values() for name in group]
    if isinstance(files, dict):
        files = {name: names if value is None else value for name, value in files.items()}
    state["converted_from"]["files"] = files
    (forged / "state.json").write_text(json.dumps(state))
    sign(forged)
    before = set(tmp_path.iterdir())
    assert main(["to-hf", str(forged), str(tmp_path / "out")]) == 0
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not Path("/tmp/victim.safetensors").exists()


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
        assert "beyond all models" in refused("from-hf", hf, tmp_path / "out", exit_codes=(3,))


@pytest.mark.parametrize("extra", [{"note": 2**80}, {"note": "\ud800"}, {"auto_map": {"AutoModel": "evil.py"}}])
def test_what_config_json_holds_beside_is_harmless(extra, hf, tmp_path):
    content = json.loads((hf / "config.json").read_text()) | extra | {"attn_implementation": "evil/kernel"}
    (hf / "config.json").write_text(json.dumps(content))
    assert main(["from-hf", str(hf), str(tmp_path / "out")]) == 0
    assert main(["verify", str(hf), str(tmp_path / "out"), "--logits"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda noted: noted.pop("tensors"),
        lambda noted: noted.update(configuration=[]),
        lambda noted: noted["configuration"].update(model=[1]),
        lambda noted: noted["configuration"]["model"].update(num_layers="many"),
        lambda noted: next(iter(noted["tensors"].values())).update(dtype="evil"),
        lambda noted: next(iter(noted["tensors"].values())).update(shape=["a"]),
        lambda noted: noted.update(files=[]),
    ],
)
def test_a_manifest_that_is_none(change, finished_run, tmp_path):
    assert main(["to-hf", str(finished_run), str(tmp_path / "hf")]) == 0
    path = tmp_path / "hf" / "manifest.json"
    noted = json.loads(path.read_text())
    change(noted)
    path.write_text(json.dumps(noted))
    assert "manifest.json" in refused("verify", finished_run, path, exit_codes=(3,))


def test_a_zip_bomb_in_common_pt(hf, tmp_path):
    convert(hf, tmp_path / "start", ImportOptions(quiet=True))
    foreign = tmp_path / "start" / "checkpoints" / "iter_0000000"
    for name in ("manifest.json", "run.yaml", "state.json"):
        (foreign / name).unlink()
    with zipfile.ZipFile(foreign / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 50_000_000 + b"N.")
    assert "common.pt" in refused("inspect", foreign, exit_codes=(4,))


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
