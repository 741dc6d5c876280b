"""The metadata of a checkpoint cannot run code."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest

from megatron_qwen.checkpoint.metadata import read_metadata
from megatron_qwen.checkpoint.paths import iteration_dir
from megatron_qwen.errors import CheckpointError


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


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_one_error(content, checkpoint):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_metadata(checkpoint)
