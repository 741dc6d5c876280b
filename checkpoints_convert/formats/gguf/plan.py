"""The GGUF files of a model: which tensors go where, of which type, made of which rows."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from checkpoints_convert.encoding import SAME_NAME
from checkpoints_convert.formats.gguf.block_encoding import GgmlEncoding
from checkpoints_convert.formats.gguf.container import Placed, Value, ValueType, header, padding
from checkpoints_convert.formats.gguf.importances import Importances
from checkpoints_convert.formats.gguf.mixture import Mixture
from checkpoints_convert.formats.gguf.model_keys import is_tied
from checkpoints_convert.formats.gguf.names import GgufTensor, gguf_tensors
from checkpoints_convert.formats.gguf.types import GgmlType, Kind
from checkpoints_convert.output import OutputFile, OutputTensor, RowSpan, pack
from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem

_FLOAT32_BYTES = 4
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a file.

    Args:
        tensor: its name, shape and sources.
        type: of its values.
    """

    tensor: GgufTensor
    type: GgmlType

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return self.tensor.rows * self.type.row_bytes(self.tensor.columns)

    @property
    def values(self) -> int:
        """Number of its values."""
        return self.tensor.rows * self.tensor.columns


@dataclass(frozen=True)
class PlannedKind:
    """The files of a kind.

    Args:
        kind: of them.
        files: what to write.
        tensors: of all files.
    """

    kind: Kind
    files: tuple[OutputFile, ...]
    tensors: tuple[PlannedTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight on average, vectors included."""
        return 8 * sum(item.size for item in self.tensors) / sum(item.values for item in self.tensors)


def choose_types(kind: Kind, model: ModelConfig, *, importances: bool) -> list[PlannedTensor]:
    """The tensors of a kind of file with their types.

    Raises:
        ConversionError: the kind cannot hold a shape.
    """
    mixture = Mixture(kind, model, tied=is_tied(model), importances=importances)
    found, problems = [], []
    for tensor in gguf_tensors(model):
        chosen = mixture.type_of(tensor)
        if isinstance(chosen, Problem):
            problems.append(Problem(f"{kind.name}: {chosen.where}", chosen.value, chosen.fix))
        else:
            found.append(PlannedTensor(tensor, chosen))
    if problems:
        raise ConversionError(problems[:_PROBLEMS_SHOWN])
    return found


def plan_kind(
    weights: TensorSet,
    tensors: Sequence[PlannedTensor],
    kind: Kind,
    keys: Mapping[str, Value],
    *,
    name: str,
    max_shard_bytes: int | None,
    importances: Importances | None,
    pool: Executor | None,
) -> PlannedKind:
    """The files of a kind.

    Args:
        weights: under Hugging Face names.
        tensors: from ``choose_types``.
        kind: of the files.
        keys: of the model and the tokenizer.
        name: the files begin with it.
        max_shard_bytes: size of values at which a new file is begun; None writes one.
        importances: an importance matrix, if there is one.
        pool: threads to encode with.
    """
    groups = [list(tensors)]
    if max_shard_bytes is not None:
        groups = pack(tensors, [item.size + len(padding(item.size)) for item in tensors], limit=max_shard_bytes)
    count = len(groups)
    files = []
    for number, group in enumerate(groups):
        # Names and keys as llama.cpp's gguf-split writes them: only the first file has the model's keys.
        split = {} if count == 1 else _split_keys(number, count, len(tensors))
        own = {**keys, **split} if number == 0 else split
        suffix = "" if count == 1 else f"-{number + 1:05d}-of-{count:05d}"
        placed = [Placed(item.tensor.name, item.tensor.shape, item.type, item.size) for item in group]
        outputs = [part for item in group for part in _outputs(weights, item, importances, pool)]
        files.append(OutputFile(f"{name}-{kind.name}{suffix}.gguf", header(own, placed), tuple(outputs)))
    return PlannedKind(kind, tuple(files), tuple(tensors))


def _split_keys(number: int, count: int, tensors: int) -> dict[str, Value]:
    return {
        "split.no": Value(ValueType.UINT16, number),
        "split.count": Value(ValueType.UINT16, count),
        "split.tensors.count": Value(ValueType.INT32, tensors),
    }


def _outputs(
    weights: TensorSet, item: PlannedTensor, importances: Importances | None, pool: Executor | None
) -> list[OutputTensor]:
    """A tensor of a file: one part, or one of each expert where each has importances of its own."""
    tensor = item.tensor
    if importances is None or not importances.has(tensor.name):
        parts = [_part(weights, item, tensor.name, tensor.sources, GgmlEncoding(item.type, None, pool))]
    else:
        parts = []
        for number, source in enumerate(tensor.sources):
            columns = partial(importances.columns, tensor.name, number)
            name = tensor.name if len(tensor.sources) == 1 else f"{tensor.name}[{number}]"
            parts.append(_part(weights, item, name, (source,), GgmlEncoding(item.type, columns, pool)))
    return [*parts[:-1], replace(parts[-1], after=padding(item.size))]


def _part(
    weights: TensorSet, item: PlannedTensor, name: str, sources: Sequence[str], encoding: GgmlEncoding
) -> OutputTensor:
    spans = tuple(_span(weights, source, item.tensor) for source in sources)
    rows = sum(span.rows for span in spans)
    made = encoding.tensors((rows, item.tensor.columns))[SAME_NAME]
    return OutputTensor(name, made.shape, made.dtype, spans, encoding)


def _span(weights: TensorSet, source: str, tensor: GgufTensor) -> RowSpan:
    """Rows of a source: of a vector, all of it is one row."""
    columns = tensor.columns
    if len(tensor.shape) == 1:
        length = weights.tensors[source].shape[0]
        return RowSpan(1, lambda start, stop: weights.rows(source, 0, length).reshape(1, columns))
    return RowSpan(
        weights.tensors[source].shape[0],
        lambda start, stop: weights.rows(source, start, stop),
        row_bytes=columns * _FLOAT32_BYTES,
    )
