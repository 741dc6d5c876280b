"""A checkpoint exported through encodings, with the plan, the writers and the manifest of ``to-hf``."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert import work
from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.encoding import Cast
from checkpoints_convert.from_hf import ImportOptions, convert
from checkpoints_convert.progress import ByteProgress
from checkpoints_convert.release import NotedTensor, is_complete, write_manifest
from checkpoints_convert.to_hf import ExportOptions, plan_files
from megatron_qwen.errors import ConversionError
from megatron_qwen.hf.mapping import HfTensor
from tests.checkpoints_convert.encodings import Int8Blocks, Int8Rows
from tests.checkpoints_convert.models import make


def encoding(item: HfTensor):
    """Rows of a query head are in spans of 32, those of a key head in spans of 16; 24 is a multiple of neither."""
    if item.name.endswith(("q_proj.weight", "k_proj.weight", "gate_proj.weight")):
        return Int8Blocks(24)
    return Int8Rows() if item.name.endswith("_proj.weight") else Cast(torch.bfloat16)


def test_an_export_with_scales(tmp_path):
    hf = make("qwen2 odd", tmp_path / "hf")
    convert(hf, tmp_path / "checkpoint", ImportOptions(quiet=True))
    source = open_checkpoint(tmp_path / "checkpoint")
    files = plan_files(source, ExportOptions(max_shard_bytes=30_000), encoding=encoding)
    assert len(files) > 3
    progress = ByteProgress(1, quiet=True)
    out, identity = tmp_path / "out", {"kind": "test"}
    with work.begin(out, identity, restart=False) as task:
        written = task.write(files, new_digest=hashlib.sha256, workers=2, progress=progress)
        noted = {
            output.name: NotedTensor(
                str(output.dtype).removeprefix("torch."),
                output.shape,
                written[file.name].tensors[output.name],
                file.name,
            )
            for file in files
            for output in file.tensors
        }
        write_manifest(
            task.directory,
            files={name: done.digest for name, done in written.items()},
            tensors=noted,
            origin={"source": {}, "data": [], "configuration": {}},
            identity=identity,
        )
        task.commit()
    assert is_complete(out, identity)

    found = {name: value for file in files for name, value in load_file(out / file.name).items()}
    weights = load_file(hf / "model.safetensors")
    matrices = 0
    for name, whole in weights.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(found.pop(name), whole), name
            continue
        matrices += 1
        blocks = name.endswith(("q_proj.weight", "k_proj.weight", "gate_proj.weight"))
        made = (Int8Blocks(24) if blocks else Int8Rows()).encode(whole, name=name)
        module = name.removesuffix(".weight")
        for part, value in made.items():
            assert torch.equal(found.pop(f"{module}.{part}" if part else name), value), (name, part)
        if not blocks:
            assert found.pop(f"{module}.weight_shape").tolist() == list(whole.shape)
    assert matrices == 21
    assert not found


def test_a_cast_that_loses_values():
    rows = torch.tensor([[1.0, 70_000.0]])
    with pytest.raises(ConversionError, match=r"norm.weight.*65,504"):
        Cast(torch.float16).encode(rows, name="norm.weight")
    # What is infinite already may stay so.
    assert Cast(torch.float16).encode(rows / 0, name="norm.weight")[""].isinf().all()
    assert Cast(torch.bfloat16).encode(rows, name="norm.weight")[""].isfinite().all()
