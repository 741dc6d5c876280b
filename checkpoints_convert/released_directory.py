"""The end of every conversion to a directory that is released: small files, index, manifest, and the rename."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from checkpoints_convert.file_writer import Written
from checkpoints_convert.output import OutputFile, OutputTensor
from checkpoints_convert.release import NotedTensor, write_manifest
from checkpoints_convert.work import UnfinishedError, Work
from megatron_qwen.data.tokenizers.release import Loader, LoaderSearch
from megatron_qwen.errors import ConversionError, DataError, Problem


def release(
    task: Work,
    files: Sequence[OutputFile],
    written: Mapping[str, Written],
    small_files: Mapping[str, bytes],
    *,
    origin: Mapping[str, Any],
    identity: Mapping[str, Any],
    tensor_name: Callable[[OutputFile, OutputTensor], str] = lambda file, output: output.name,
) -> int:
    """Writes what is small and the manifest, and makes the directory appear.

    Args:
        task: the work, with all weights written.
        files: of weights.
        written: what was written of each, by its name.
        small_files: all other files but the manifest, by name.
        origin: where the weights come from.
        identity: all that decided the bytes.
        tensor_name: under which name the manifest lists a tensor.

    Returns:
        Bytes that an earlier attempt had written.

    Raises:
        OccupiedError: the output was created meanwhile.
    """
    for name, content in small_files.items():
        (task.directory / name).write_bytes(content)
    write_manifest(
        task.directory,
        files={name: done.digest for name, done in written.items()},
        tensors={
            tensor_name(file, output): NotedTensor(
                str(output.dtype).removeprefix("torch."),
                output.shape,
                written[file.name].tensors[output.name],
                file.name,
            )
            for file in files
            for output in file.tensors
        },
        origin=origin,
        identity=identity,
    )
    task.commit()
    return sum(done.kept_bytes for done in written.values())


def confirmed_loader(loaders: LoaderSearch) -> Loader:
    """The class that loads the tokenizer.

    Raises:
        UnfinishedError: there is none; the weights are right all the same, and stay.
    """
    try:
        return loaders.confirm()
    except (ConversionError, DataError) as error:
        kept = Problem("weights", None, "are written and kept; the same command resumes, --restart discards them.")
        raise UnfinishedError([*error.problems, kept]) from None


def index_text(files: Sequence[OutputFile]) -> str:
    """model.safetensors.index.json of some files."""
    outputs = [(output, file.name) for file in files for output in file.tensors]
    metadata = {
        "total_parameters": sum(torch.Size(output.shape).numel() for output, _ in outputs),
        "total_size": sum(output.value_bytes for output, _ in outputs),
    }
    content = {"metadata": metadata, "weight_map": {output.name: name for output, name in outputs}}
    return json_text(content, sort_keys=True)


def json_text(content: Mapping[str, Any], *, sort_keys: bool = False) -> str:
    """A file of JSON, as Hugging Face's are."""
    return json.dumps(content, indent=2, sort_keys=sort_keys) + "\n"
