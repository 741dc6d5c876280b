"""Broken or hostile checkpoints and manifests are refused: nothing is written, and nothing in them runs."""

import dataclasses
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_convert.convert import main
from checkpoints_convert.from_hf import ImportOptions, convert
from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.metadata import read_metadata
from tests.checkpoint.test_metadata import _Command as Command
from tests.checkpoint.test_metadata import crafted, torch_saved
from tests.checkpoints_convert.refusal import CANARY, assert_untouched, refused


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
    "shard that is not noted": (lambda path: (path / "__7_0.distcp").write_text(""), "not in the manifest"),
    "tokenizer that is not noted": (
        lambda path: ((path / "tokenizer").mkdir(exist_ok=True), (path / "tokenizer/merges.txt").write_text("")),
        "not in the manifest",
    ),
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
        "are not part of the configured model",
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
    assert "has the shape (384, 64), but the configuration requires (999, 64)" in message
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
