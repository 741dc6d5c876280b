"""The metadata of a checkpoint cannot run code."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.metadata import read_metadata
from megatron_qwen.checkpoint.paths import iteration_dir
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import CheckpointError
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs


class _Command:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def crafted(function: object, *arguments: object) -> bytes:
    buffer = io.BytesIO()
    pickle.dump(_Command(function, *arguments), buffer)
    return buffer.getvalue()


@pytest.fixture
def checkpoint(finished_run, tmp_path) -> Path:
    shutil.copytree(iteration_dir(finished_run / "checkpoints", 8), tmp_path / "iter_0000008")
    return tmp_path / "iter_0000008"


def test_genuine_metadata_is_read(checkpoint):
    names = read_metadata(checkpoint).state_dict_metadata
    assert "decoder.layers.self_attention.linear_qkv.weight" in names


def test_crafted_metadata_is_refused_and_not_run(checkpoint, tmp_path):
    witness = tmp_path / "ran"
    payloads = {
        "os.system": crafted(os.system, f"touch {witness}"),
        "posix.system": b"cposix\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR.",
        "builtins.eval": crafted(eval, f"open({str(witness)!r}, 'w')"),
        "getattr": crafted(getattr, "x", "__class__"),
        "nested torch": b"ctorch.serialization\nos.system\n(S'touch " + str(witness).encode() + b"'\ntR.",
    }
    for name, payload in payloads.items():
        (checkpoint / ".metadata").write_bytes(payload)
        with pytest.raises(CheckpointError, match=r"refused.*Do not load"):
            read_metadata(checkpoint)
        assert not witness.exists(), name


def test_metadata_cannot_change_a_class(checkpoint):
    """BUILD with slot state sets attributes on whatever is on the stack, a class that may be named included."""
    classes = ("pathlib\nPosixPath", "torch.distributed.checkpoint.metadata\nMetadata")
    for named in (*classes, "torch.serialization\n_get_layout"):
        # GLOBAL named; tuple (None, {"is_symlink": dict}); BUILD
        pickled = b"\x80\x02c" + named.encode() + b"\n(N}X\n\x00\x00\x00is_symlinkcbuiltins\ndict\nstb."
        (checkpoint / ".metadata").write_bytes(pickled)
        with pytest.raises(CheckpointError, match="refused"):
            read_metadata(checkpoint)
        assert not isinstance(getattr(Path, "is_symlink"), type)  # noqa: B009
        assert Path("/nowhere").is_symlink() is False


def test_metadata_with_other_types_is_one_error(checkpoint):
    metadata = read_metadata(checkpoint)
    name = "decoder.final_layernorm.weight"
    for change in (
        lambda: setattr(metadata.state_dict_metadata[name], "properties", None),
        lambda: setattr(metadata, "state_dict_metadata", ["a"]),
        lambda: setattr(metadata, "storage_data", None),
    ):
        change()
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="damaged"):
            read_metadata(checkpoint)


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_one_error(content, checkpoint):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_metadata(checkpoint)


def forge(checkpoint: Path, name: str, payload: bytes) -> None:
    """Replaces an object in the shards by other bytes, and mends metadata and manifest so that they agree."""
    metadata = read_metadata(checkpoint)
    index = next(index for index in metadata.storage_data if index.fqn.startswith(name))
    stored = metadata.storage_data[index]
    shard = checkpoint / stored.relative_path
    stored.offset, stored.length = shard.stat().st_size, len(payload)
    with shard.open("ab") as file:
        file.write(payload)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    entries = {file: manifest.hash_file(checkpoint / file) for file in manifest.files_in(checkpoint)}
    manifest.write(checkpoint, entries, iteration=8, attempt=1)


def torch_saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def resume_refused(config: RunConfig, run_dir: Path) -> str:
    """Tries to resume; answers with the error."""
    from megatron_qwen.errors import CheckpointError

    try:
        jobs.attempt(config, run_dir)
    except CheckpointError as error:
        return error.render()
    return "loaded"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_crafted_object_in_a_shard_is_refused_and_not_run(ranks, finished_run, pool, tmp_path):
    run_dir, witness = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(finished_run, run_dir)
    forge(
        iteration_dir(run_dir / "checkpoints", 8), "common_state", torch_saved(_Command(os.system, f"touch {witness}"))
    )
    config = resolve(str(run_dir / "run.yaml"), ["training.train_iters=9"], RECIPES)
    for message in pool[ranks].run(resume_refused, config, run_dir):
        assert "is refused" in message, message
    assert not witness.exists()
