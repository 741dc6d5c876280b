"""What can be compared: a checkpoint, a Hugging Face directory, or the manifest of a released one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.answering import answering_files
from checkpoints_convert.checkpoint_source import CheckpointSource, open_checkpoint
from checkpoints_convert.dequantize.quantized_directory import QuantizedDirectory, states_quantization
from checkpoints_convert.dequantize.quantized_tensors import QuantizedTensors
from checkpoints_convert.exported_config import exported_config
from checkpoints_convert.exported_ids import generation_of_source, generation_of_tokenizer
from checkpoints_convert.formats.gguf.reading import GgufFile, is_gguf
from checkpoints_convert.hf_directory import CONFIG, HfDirectory
from checkpoints_convert.quantize.padding import PaddedWeights, Padding
from checkpoints_convert.release import ReleaseManifest, sha256
from checkpoints_convert.released_directory import json_text
from checkpoints_convert.tensor_set import ExportedWeights, TensorSet
from megatron_qwen.config.moved import with_moved_fields
from megatron_qwen.config.run import Architecture
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.data.tokenizers.release import released_files, without_dropout
from megatron_qwen.data.tokenizers.tokenizer import TOKENIZER_FILES
from megatron_qwen.errors import ConversionError, DataError, Problem
from megatron_qwen.hf.config import hf_config


@dataclass(frozen=True)
class Side:
    """One of two things that are compared.

    Args:
        path: as it was named.
        kind: ``checkpoint``, ``huggingface`` or ``manifest``.
        architecture: its shape and its RoPE.
        stated: its config.json, or the one that an export has; None of a manifest.
        described: shape, format (torch's name) and, of a manifest, xxh3-128 of every tensor.
        tensors: the values; None of a manifest.
        tokenizer: SHA-256 of the tokenizer's files.
        tokenizer_dir: where they lie; None of a manifest or where there is none.
        generation: generation_config.json that it came with, if any.
        checkpoint: what is known of a checkpoint.
        manifest: of a manifest.
        quantized: the same as ``tensors``, where weights are quantized; None of the others.
        stored: the tensors of a quantized directory under the names that its files have.
    """

    path: Path
    kind: str
    architecture: Architecture
    stated: Mapping[str, Any] | None
    described: Mapping[str, tuple[tuple[int, ...], str, str | None]]
    tensors: TensorSet | None
    tokenizer: Mapping[str, str]
    tokenizer_dir: Path | None
    generation: Mapping[str, Any] | None = None
    checkpoint: CheckpointSource | None = None
    manifest: ReleaseManifest | None = None
    quantized: QuantizedTensors | None = None
    stored: TensorSet | None = None
    gguf: GgufFile | None = None

    @property
    def model(self) -> ModelConfig:
        """Its shape."""
        return self.architecture.model

    @property
    def values(self) -> int:
        """How many weights it has."""
        return sum(torch.Size(shape).numel() for shape, _, _ in self.described.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in its files, scales and zeros included."""
        if self.gguf is not None:
            return self.gguf.stored_bytes
        if self.quantized is not None:
            return sum(self.quantized.stored_bytes(name) for name in self.described)
        return sum(
            torch.Size(shape).numel() * getattr(torch, dtype).itemsize for shape, dtype, _ in self.described.values()
        )

    def as_stored(self) -> "Side":
        """A quantized directory as the tensors of its files, which is what a manifest describes."""
        if self.stored is None:
            return self
        return replace(self, tensors=self.stored, described=_described(self.stored), quantized=None, stored=None)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path.resolve().name

    @property
    def digest(self) -> str:
        """What tells it from every other; of a checkpoint or a directory."""
        held = self.checkpoint if self.checkpoint is not None else self.tensors
        assert isinstance(held, CheckpointSource | HfDirectory)
        return held.digest()

    @property
    def is_release(self) -> bool:
        """Whether its weights are quantized."""
        return self.quantized is not None or self.gguf is not None

    def padded(self, padding: Padding) -> "Side":
        """In a larger shape, with zeros."""
        assert self.tensors is not None
        model = padding.model(self.model)
        tensors = PaddedWeights(self.tensors, model)
        architecture = replace(self.architecture, model=model)
        return replace(self, architecture=architecture, tensors=tensors, described=_described(tensors))

    def config(self) -> dict[str, Any]:
        """The architecture in Hugging Face's terms, which both sides share."""
        return hf_config(self.architecture, eos_token_id=None, bos_token_id=None, dtype="")


def open_side(
    path: Path,
    *,
    iteration: int | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    quantized: bool = False,
) -> Side:
    """Opens whatever lies at a path.

    Args:
        path: a checkpoint, a Hugging Face directory or a manifest.
        iteration: which checkpoint of a run.
        config: recipe or run.yaml of a checkpoint that has none.
        overrides: ``section.field=value`` words that go with it.
        quantized: whether a directory may be quantized; its weights are then read dequantized.

    Raises:
        ConversionError: a Hugging Face directory or a manifest that cannot be read.
        CheckpointError: a checkpoint that cannot be trusted, or nothing that is any of the three.
    """
    if path.is_file():
        return _file_side(path, quantized=quantized)
    if (path / CONFIG).is_file():
        return _quantized_side(path) if quantized and states_quantization(path) else _hf_side(path)
    return _checkpoint_side(path, iteration, config, overrides)


def _file_side(path: Path, *, quantized: bool) -> Side:
    """A model in one file, or a manifest."""
    if not is_gguf(path):
        return _manifest_side(path)
    if not quantized:
        raise ConversionError(Problem(str(path), None, "is a GGUF file; name the model that it was made of."))
    source = GgufFile(path)
    return Side(path, "gguf", source.architecture, source.config, _described(source), source, {}, None, gguf=source)


def _manifest_side(path: Path) -> Side:
    manifest = ReleaseManifest(path)
    reader = YamlReader(extra_fields=True)
    architecture = reader.read(Architecture, with_moved_fields(manifest.configuration))
    if architecture is None or reader.problems:
        raise ConversionError(Problem(str(path), "configuration", "is missing or damaged."))
    described = {name: (noted.shape, noted.dtype, noted.xxh3_128) for name, noted in manifest.tensors.items()}
    tokenizer = {name: digest for name, (_, digest) in manifest.files.items() if name in TOKENIZER_FILES}
    return Side(path, "manifest", architecture, None, described, None, tokenizer, None, manifest=manifest)


def _hf_side(path: Path) -> Side:
    return _directory_side(path, HfDirectory(path))


def _quantized_side(path: Path) -> Side:
    source = QuantizedDirectory(path)
    return replace(_directory_side(path, source), quantized=source, stored=source.stored)


def _directory_side(path: Path, source: HfDirectory) -> Side:
    return Side(
        path,
        "huggingface",
        source.architecture,
        source.config,
        _described(source),
        source,
        *_tokenizer(path),
        generation=source.generation,
    )


def _checkpoint_side(path: Path, iteration: int | None, config: str | None, overrides: Sequence[str]) -> Side:
    source = open_checkpoint(path, iteration=iteration, config=config, overrides=overrides, where_needed=True)
    weights = ExportedWeights(source.weights)
    files, directory = ({}, None) if source.tokenizer is None else _tokenizer(source.tokenizer)
    if source.tokenizer is not None:  # an export has them in the form that others load
        released = released_files(source.tokenizer)
        files = {name: hashlib.sha256(content).hexdigest() for name, content in released.items()}
    for name, changed in answering_files(source).items():  # of a model that answers
        files[name] = hashlib.sha256(json_text(changed).encode()).hexdigest()
    return Side(
        source.path,
        "checkpoint",
        source.config.architecture,
        _exported(source),
        _described(weights),
        weights,
        files,
        directory,
        generation=generation_of_tokenizer(source) or generation_of_source(source),
        checkpoint=source,
    )


def _exported(source: CheckpointSource) -> dict[str, Any] | None:
    """config.json of an export; None where there can be none, which is no fault of a comparison."""
    try:
        return exported_config(source, dtype="")
    except (ConversionError, DataError):
        return None


def _described(source: TensorSet) -> dict[str, tuple[tuple[int, ...], str, str | None]]:
    return {name: (info.shape, str(info.dtype).removeprefix("torch."), None) for name, info in source.tensors.items()}


def _tokenizer(path: Path) -> tuple[dict[str, str], Path | None]:
    files = {name: sha256(path / name) for name in TOKENIZER_FILES if (path / name).is_file()}
    if "tokenizer.json" in files:  # an export has it without dropout
        files["tokenizer.json"] = hashlib.sha256(without_dropout((path / "tokenizer.json").read_bytes())).hexdigest()
    usable = any(name in files for name in ("tokenizer.json", "tokenizer.model"))
    return files, path if usable else None
