"""The weights of a checkpoint by the names of the mapping table, however megatron-core stored them.

megatron-core stores a weight of all layers as one tensor with the layer as first dimension, or (metadata
``non_homogeneous_layers``) as one tensor per layer; experts likewise. With ``singleton_local_shards`` the gate and up
halves of a SwiGLU matrix are two tensors, ``_w`` and ``_v``. Readers of this module see no difference.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from megatron_qwen.checkpoint.read import CheckpointReader, Chunk, TensorInfo
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import CheckpointError, Problem
from megatron_qwen.hf.mapping import CoreTensor, TensorMapping, core_tensors

_SHOWN = 10
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)
# Prefixes of tensors that are not weights.
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state", "common_state", "opt_param_scheduler")


@dataclass(frozen=True)
class _Stored:
    """One of the stored tensors that make up a weight.

    Args:
        name: its name in the checkpoint.
        leading: index of its leading dimensions (layer, expert).
        start: row of the weight at which it begins.
        rows: how many rows of the weight it holds, padding included.
    """

    name: str
    leading: tuple[int, ...]
    start: int
    rows: int


class ModelWeights(Protocol):
    """The weights of one model under the names of the mapping table."""

    @property
    def model(self) -> ModelConfig:
        """Its shape."""

    def dtype(self, core: str) -> torch.dtype:
        """The dtype of a weight."""

    def rows(self, item: CoreTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight at one layer and expert, without its leading dimensions."""

    def chunks(self) -> Iterator[Chunk]:
        """Every stored slice of the checkpoint that holds a weight."""


class CheckpointWeights:
    """The weights of one model in a checkpoint.

    Args:
        reader: the checkpoint.
        model: the shape they must have.
        table: what the checkpoint holds of the model (``hf/adapters.py``); None is all of it.

    Raises:
        CheckpointError: with every weight that is missing, of another shape, or not a weight of this model.
    """

    def __init__(
        self, reader: CheckpointReader, model: ModelConfig, table: Sequence[TensorMapping] | None = None
    ) -> None:
        self.reader, self._model, self._table = reader, model, table
        self._tensors = reader.tensors()
        self._stored: dict[tuple[str, tuple[int, ...]], tuple[_Stored, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        if problems := self._problems():
            raise CheckpointError(problems)

    @property
    def model(self) -> ModelConfig:
        """The shape that they have."""
        return self._model

    def dtype(self, core: str) -> torch.dtype:
        """The dtype of a weight."""
        return self._dtypes[core]

    def rows(self, item: CoreTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight at one layer and expert, without its leading dimensions."""
        found = []
        for stored in self._stored[item.mapping.core, item.leading]:
            low, high = max(start, stored.start), min(stop, stored.start + stored.rows)
            if low < high:
                found.append(
                    self.reader.read_rows(stored.name, low - stored.start, high - stored.start, leading=stored.leading)
                )
        return found[0] if len(found) == 1 else torch.cat(found)

    def chunks(self) -> Iterator[Chunk]:
        """Every stored slice that holds a weight."""
        seen: set[tuple[str, int]] = set()
        for pieces in self._stored.values():
            for stored in pieces:
                for chunk in self.reader.chunks(stored.name, stored.leading):
                    if (chunk.file, chunk.start) not in seen:
                        seen.add((chunk.file, chunk.start))
                        yield chunk

    def _problems(self) -> list[Problem]:
        where, wrong, missing = str(self.reader.directory), dict[str, Problem](), list[str]()
        used: set[str] = set()
        for item in core_tensors(self.model, self._table):
            names = _stored_names(self._tensors, item)
            if names is None:
                missing.append(f"{item.mapping.core} {item.leading}")
                continue
            used |= {name for name, _ in names}
            if fix := self._place(item, names):
                wrong.setdefault(item.mapping.core, Problem(where, item.mapping.core, fix))
        problems = [problem for name in sorted(used) for problem in self.reader.problems(name)] + list(wrong.values())
        extra = sorted(name for name in self._tensors if name not in used and not name.startswith(_NOT_WEIGHTS))
        for names_, fix in (
            (missing, "tensors of the configuration are not in the checkpoint"),
            (extra, "tensors of the checkpoint are not part of the configured model"),
        ):
            if names_:
                shown = ", ".join(names_[:_SHOWN]) + (", ..." if len(names_) > _SHOWN else "")
                problems.append(Problem(where, f"{len(names_)}", f"{fix}: {shown}."))
        return problems

    def _place(self, item: CoreTensor, names: tuple[tuple[str, tuple[int, ...]], ...]) -> str | None:
        """Records where a weight is stored; returns what is wrong with it, else None."""
        mapping, shapes = item.mapping, [self._tensors[name].shape for name, _ in names]
        inner = [shape[len(leading) :] for shape, (_, leading) in zip(shapes, names, strict=True)]
        if any(
            place >= size
            for shape, (_, leading) in zip(shapes, names, strict=True)
            for place, size in zip(leading, shape, strict=False)
        ) or not all(inner):
            return f"has the shape {shapes[0]}, which has no index {item.leading} (layer, expert)."
        rows = sum(shape[0] for shape in inner)
        if any(shape[1:] != mapping.core_shape[1:] for shape in inner) or not (
            rows >= mapping.num_rows if mapping.padded else rows == mapping.num_rows
        ):
            return f"has the shape {(rows, *inner[0][1:])}, but the configuration requires {mapping.core_shape}."
        expected = self.model.num_layers if mapping.per_layer else None
        if expected is not None and len(names[0][1]) == len(item.leading) and shapes[0][0] != expected:
            return f"has {shapes[0][0]} layers, but the configuration requires {expected}."
        if mapping.per_expert and len(names[0][1]) == 2 and shapes[0][1] != self.model.num_moe_experts:
            return f"has {shapes[0][1]} experts, but the configuration requires {self.model.num_moe_experts}."
        if any(self._tensors[name].dtype not in _FORMATS for name, _ in names):
            return f"has the dtype {self._tensors[names[0][0]].dtype}; supported are bfloat16, float16 and float32."
        dtypes = {self._tensors[name].dtype for name, _ in names} | {self._dtypes.get(mapping.core)} - {None}
        if len(dtypes) > 1:
            return f"has several dtypes: {', '.join(sorted(map(str, dtypes)))}."
        self._dtypes[mapping.core] = self._tensors[names[0][0]].dtype
        starts = accumulate((shape[0] for shape in inner), initial=0)
        self._stored[mapping.core, item.leading] = tuple(
            _Stored(name, leading, start, shape[0])
            for (name, leading), start, shape in zip(names, starts, inner, strict=False)
        )
        return None


def _stored_names(
    tensors: Mapping[str, TensorInfo], item: CoreTensor
) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
    """The tensors a weight is stored in, with the index of their leading dimensions; None if there is none."""
    candidates = [(item.mapping.core, item.leading)]
    if item.mapping.per_layer:
        layer, *rest = item.leading
        named = item.mapping.core.replace(".layers.", f".layers.{layer}.")
        candidates.append((named, tuple(rest)))
        if item.mapping.per_expert:
            candidates.append((named.replace(".experts.experts.", f".experts.experts.{rest[0]}."), ()))
    for name, leading in candidates:
        if name in tensors:
            return ((name, leading),)
        if f"{name}_w" in tensors and f"{name}_v" in tensors:
            return ((f"{name}_w", leading), (f"{name}_v", leading))
    return None
