"""Compares a model with a GGUF file of it: every tensor by its error against what its type can hold."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.compare.quantized_limits import largest_error
from checkpoints_convert.compare.tensor_difference import Difference
from checkpoints_convert.formats.gguf.container import Value, ValueType
from checkpoints_convert.formats.gguf.names import gguf_name
from checkpoints_convert.formats.gguf.reading import GgufFile
from checkpoints_convert.formats.gguf.vocabulary import tokenizer_keys
from checkpoints_convert.tensor_set import TensorSet, blocks


@dataclass
class GgufSummary:
    """What the comparison of a GGUF file found.

    Args:
        types: of the tensors in the file, with how many have them.
        errors: relative rms error by Hugging Face name.
    """

    types: Counter[str] = field(default_factory=Counter)
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        named = ", ".join(f"{count} {name}" for name, count in sorted(self.types.items()))
        if not self.errors:
            return f"GGUF: {named}"
        worst = max(self.errors, key=lambda name: self.errors[name])
        return f"GGUF: {named}; largest relative error {self.errors[worst]:.4f} ({worst})"

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        worst = sorted(self.errors, key=lambda name: -self.errors[name])[:10]
        return {
            "scheme": "gguf",
            "types": dict(self.types),
            "worst": [{"name": name, "relative_error": self.errors[name]} for name in worst],
        }


class GgufComparison:
    """A model and its GGUF file.

    Args:
        reference: the original.
        file: the release.
    """

    def __init__(self, reference: TensorSet, file: GgufFile) -> None:
        self._reference, self._file = reference, file
        self.summary = GgufSummary(Counter(stored.type.name for stored in file.stored.values()))

    @property
    def types(self) -> list[str]:
        """Names of the types in the file."""
        return list(self.summary.types)

    def compare(self, name: str) -> Difference | None:
        """What is wrong with a tensor; None if its error is within that of its type."""
        shapes = [list(side.tensors[name].shape) for side in (self._reference, self._file)]
        if shapes[0] != shapes[1]:
            return Difference("tensor", name, f"has the shapes {shapes[0]} and {shapes[1]}")
        squares, apart = 0.0, 0.0
        for ours, theirs in blocks([self._reference, self._file], name):
            one, other = ours.float(), theirs.float()
            squares += float(one.double().square().sum())
            apart += float((one - other).double().square().sum())
        error = (apart / squares) ** 0.5 if squares else (0.0 if apart == 0 else float("inf"))
        self.summary.errors[name] = error
        type_ = self._file.stored[gguf_name(name)].type.name
        most = largest_error(type_)
        if error <= most:
            return None
        detail = f"is another weight: its relative error is {error:.3g}; {type_} has at most {most:g}"
        return Difference("tensor", name, detail, error)


def tokenizer_differences(file: GgufFile, tokenizer: Path, *, eos: int | None = None) -> list[Difference]:
    """The keys of the tokenizer in a file that are not those of a directory's tokenizer.

    Args:
        file: the file.
        tokenizer: the directory.
        eos: id that ends what the model writes, where the tokenizer's files say another.

    Raises:
        ConversionError: llama.cpp has no tokenizer that gives the ids of that one.
    """
    keys = tokenizer_keys(tokenizer, file.config, vocab_size=file.architecture.model.vocab_size, eos=eos)
    return [
        Difference("tokenizer", name, f"is not what {tokenizer} gives")
        for name, value in keys.items()
        if file.keys.get(name) != _as_read(value)
    ]


def _as_read(value: Value) -> Any:
    """What a reader of a file gets of a value: lists, and numbers of 32 bits."""
    content = value.content
    if value.type == ValueType.FLOAT32:
        content = torch.tensor(content, dtype=torch.float32).tolist()
    return list(content) if isinstance(content, list | tuple) else content
