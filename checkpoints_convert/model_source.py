"""A model to read: a run, a checkpoint of any layout, or a Hugging Face directory, as one thing."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.checkpoint_source import CheckpointSource, damaged, open_checkpoint
from checkpoints_convert.exported_config import exported_config
from checkpoints_convert.exported_ids import new_generation
from checkpoints_convert.hf_directory import CONFIG, HfDirectory
from checkpoints_convert.origin import checkpoint_origin, data_origin, published_configuration
from checkpoints_convert.tensor_set import ExportedWeights, ImportedWeights, TensorSet
from megatron_qwen.checkpoint.weights import ModelWeights
from megatron_qwen.config.run import Architecture
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import CheckpointError, ConversionError, Problem
from megatron_qwen.hf.kept import is_local_path

_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class ModelSource:
    """An open source of weights.

    Args:
        path: as it was named, of a checkpoint the iteration's directory.
        architecture: its shape and RoPE.
        weights: its tensors by Hugging Face names.
        tokenizer: directory with the tokenizer's files; None where there is none.
        checkpoint: what is known of a checkpoint; None of a directory.
        directory: the Hugging Face directory; None of a checkpoint.
    """

    path: Path
    architecture: Architecture
    weights: TensorSet
    tokenizer: Path | None
    checkpoint: CheckpointSource | None = None
    directory: HfDirectory | None = None

    @property
    def model(self) -> ModelConfig:
        """Its shape."""
        return self.architecture.model

    @property
    def core_weights(self) -> ModelWeights | ImportedWeights:
        """Its weights as a checkpoint names and cuts them."""
        if self.checkpoint is not None:
            return self.checkpoint.weights
        return ImportedWeights(self.weights, self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The widest format of its weights."""
        return max((info.dtype for info in self.weights.tensors.values()), key=lambda dtype: dtype.itemsize)

    @property
    def name(self) -> str:
        """What people call it: of a checkpoint the run's name."""
        if self.checkpoint is not None and self.checkpoint.run_dir is not None:
            return self.checkpoint.run_dir.name
        return self.path.resolve().name

    def config(self, *, dtype: str) -> dict[str, Any]:
        """config.json of the same weights in another format, unquantized.

        Args:
            dtype: torch's name of it.
        """
        if self.checkpoint is not None:
            return exported_config(self.checkpoint, dtype=dtype)
        content = dict(self._stated())
        named = content.get("_name_or_path")
        if isinstance(named, str) and is_local_path(named):
            del content["_name_or_path"]
        for key in [key for key in ("dtype", "torch_dtype") if key in content] or ["torch_dtype"]:
            content[key] = dtype
        return content

    def generation(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """generation_config.json to write; None where it is among the tokenizer's files, or there is none."""
        return None if self.checkpoint is None else new_generation(self.checkpoint, config)

    def origin(self) -> dict[str, Any]:
        """Source, data and configuration, as a manifest has them."""
        if self.checkpoint is not None:
            return {
                "source": checkpoint_origin(self.checkpoint, local_paths=False),
                "data": data_origin(self.checkpoint, local_paths=False),
                "configuration": published_configuration(self.checkpoint.config, local_paths=False),
            }
        assert self.directory is not None
        named = {"kind": "huggingface", "name": self.name, "xxh3_128": self.directory.digest()}
        return {"source": named, "data": [], "configuration": dataclasses.asdict(self.architecture)}

    def explained(self, error: CheckpointError) -> CheckpointError:
        """An error met while weights were read, with all damage that a checkpoint has."""
        return error if self.checkpoint is None else damaged(self.checkpoint.path, error)

    def _stated(self) -> Mapping[str, Any]:
        assert self.directory is not None
        return self.directory.config or {}


def open_model_source(
    path: Path,
    *,
    iteration: int | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    tokenizer: Path | None = None,
) -> ModelSource:
    """Opens a model.

    Args:
        path: a run, a checkpoint root, one iteration, or a Hugging Face directory.
        iteration: which checkpoint; None is the newest.
        config: recipe or run.yaml of a checkpoint that has none.
        overrides: ``section.field=value`` words that go with it.
        tokenizer: tokenizer directory, instead of the source's.

    Raises:
        ConversionError: a directory that cannot be read, or is quantized already.
        CheckpointError: a checkpoint that cannot be trusted, or nothing of the kind.
    """
    if path.is_file():
        raise ConversionError(Problem(str(path), None, _why_no_file(path)))
    if not (path / CONFIG).is_file():
        source = open_checkpoint(path, iteration=iteration, config=config, overrides=overrides, tokenizer=tokenizer)
        weights = ExportedWeights(source.weights)
        return ModelSource(source.path, source.config.architecture, weights, source.tokenizer, checkpoint=source)
    _require_unquantized(path / CONFIG)
    directory = HfDirectory(path)
    if tokenizer is None:
        tokenizer = path if directory.tokenizer_files() else None
    elif not tokenizer.is_dir():
        raise ConversionError(Problem("--tokenizer", tokenizer, "is not a directory."))
    return ModelSource(path, directory.architecture, directory, tokenizer, directory=directory)


def _why_no_file(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC:
            return "is a GGUF file: its values are rounded already; name the checkpoint or directory it was made of."
    return "is a file; name a run, a checkpoint or a Hugging Face directory."


def _require_unquantized(path: Path) -> None:
    """Raises ConversionError for a directory of quantized weights; whatever else is wrong is said by who reads it."""
    try:
        content = json.loads(path.read_bytes())
        quantized = content.get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        fix = "its weights are quantized already; name the checkpoint or directory that they were made of."
        raise ConversionError(Problem(f"{path}: quantization_config", method, fix))
