"""A GGUF file as the weights of a model, under Hugging Face names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.formats.gguf.dequantize import dequantize
from checkpoints_convert.formats.gguf.model_keys import config_of, require_computable
from checkpoints_convert.formats.gguf.names import EMBEDDING, OUTPUT, gguf_tensors, sources_by_name
from checkpoints_convert.formats.gguf.parsing import StoredTensor, parse
from megatron_qwen.checkpoint.read import TensorInfo
from megatron_qwen.config.run import Architecture
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf.config import architecture_from_hf
from megatron_qwen.hf.mapping import hf_tensors

_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MOST_SHARDS = 10_000
_SHOWN = 5
# Rows of the rotary frequencies that some converters write; they hold what is computed without them.
_SURPLUS = ("rope_freqs.weight",)


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()


class GgufFile:
    """A model in a GGUF file, or in several (``-00001-of-0000N``).

    Args:
        path: the file; of several, any of them.

    Attributes:
        keys: contents of the keys by name, tokenizer included.
        stored: the tensors as they are stored, by their name in the file.
        config: config.json of the model.
        architecture: its shape and RoPE.
        tensors: shape and float32 by Hugging Face name.

    Raises:
        ConversionError: with what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = shards(path)
        parsed = [parse(file) for file in self.files]
        self.keys: dict[str, Any] = parsed[0].keys
        self.stored: dict[str, StoredTensor] = {}
        for one in parsed:
            for item in one.tensors:
                if item.name in self.stored:
                    raise ConversionError(Problem(str(item.path), item.name, "is in another file of the model too."))
                self.stored[item.name] = item
        self._check_split([one.keys for one in parsed])
        self.config = self._config()
        self.architecture: Architecture = architecture_from_hf(self.config, where=str(path))
        self._check_shapes()
        require_computable(self.architecture)
        self._places = {name: (holder, number) for name, holder, number in sources_by_name(self.architecture.model)}
        self.tensors: Mapping[str, TensorInfo] = {
            item.name: TensorInfo(item.shape, torch.float32) for item in hf_tensors(self.architecture.model)
        }

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(stored.size for stored in self.stored.values())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor, float32 [stop - start, ...]."""
        holder, number = self._places[name]
        stored, shape = self.stored[holder], self.tensors[name].shape
        if len(shape) == 1:
            return self._read(stored, 0, 1).flatten()[start:stop]
        first = number * shape[0]
        return self._read(stored, first + start, first + stop)

    def _read(self, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
        """Rows over all experts; a vector is one row."""
        width = stored.row_bytes
        data = torch.empty((stop - start, width), dtype=torch.uint8)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset + start * width)
            view = memoryview(data.view(-1).numpy())
            while len(view):
                taken = file.readinto(view)
                if not taken:
                    raise ConversionError(Problem(str(stored.path), stored.name, "is truncated."))
                view = view[taken:]
        return dequantize(data, stored.type)

    def _config(self) -> dict[str, Any]:
        embedding = self.stored.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise ConversionError(Problem(str(self.path), EMBEDDING, "is missing, or no matrix."))
        return config_of(
            self.keys,
            vocab_size=embedding.shape[0],
            tied=OUTPUT not in self.stored,
            biased="blk.0.attn_q.bias" in self.stored,
            where=str(self.path),
        )

    def _check_split(self, keys: list[dict[str, Any]]) -> None:
        """Raises ConversionError where the files are not those of one model, in order."""
        if len(keys) == 1:
            return
        for number, one in enumerate(keys):
            if (one.get("split.no"), one.get("split.count")) != (number, len(keys)):
                fix = f"must be {number} of {len(keys)} (split.no, split.count): a file of another model, or renamed."
                said = f"{one.get('split.no')} of {one.get('split.count')}"
                raise ConversionError(Problem(str(self.files[number]), said[:80], fix))
        if (total := self.keys.get("split.tensors.count")) != len(self.stored):
            fix = f"is split.tensors.count, and the files have {len(self.stored)} tensors."
            raise ConversionError(Problem(str(self.path), str(total)[:40], fix))

    def _check_shapes(self) -> None:
        """Raises ConversionError where the tensors are not those that the keys describe."""
        model = self.architecture.model
        # Before names are made, which a hostile file could ask for by the billion: the tensors of as many layers and
        # experts must be in the file.
        for layer in range(model.num_layers if model.is_moe else 0):
            found = self.stored.get(name := f"blk.{layer}.ffn_gate_exps.weight")
            if found is None or len(found.shape) != 3 or found.shape[0] != model.num_moe_experts:
                fix = f"is missing, or does not hold the {model.num_moe_experts} experts that the keys say."
                raise ConversionError(Problem(str(self.path), name, fix))
        expected = {item.name: item.shape for item in gguf_tensors(model)}
        problems = []
        if missing := sorted(expected.keys() - self.stored.keys()):
            problems.append(Problem(str(self.path), ", ".join(missing[:_SHOWN]), "are missing."))
        if extra := sorted(self.stored.keys() - expected.keys() - {*_SURPLUS}):
            shown = ", ".join(name[:80] for name in extra[:_SHOWN])
            problems.append(Problem(str(self.path), shown, "do not belong to the model that the keys describe."))
        for name in sorted(expected.keys() & self.stored.keys()):
            shape = self.stored[name].shape
            # A row of one may be a matrix or a vector: ggml has no difference.
            if shape != expected[name] and shape != (1, *expected[name]):
                fix = f"has the shape {[*shape]} where the keys say {[*expected[name]]}."
                problems.append(Problem(str(self.path), name, fix))
        if problems:
            raise ConversionError(problems[: _SHOWN * 2])


def shards(path: Path) -> list[Path]:
    """The files of a model, of which one is named.

    Raises:
        ConversionError: one is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    if not 1 <= count <= _MOST_SHARDS:
        raise ConversionError(Problem(str(path), count, "is no number of files of a model."))
    found = [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise ConversionError(Problem(str(path.parent), ", ".join(missing[:_SHOWN]), "are missing."))
    return found
