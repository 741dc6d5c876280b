"""Which files a quantized release has: every tensor, where its rows come from, and what encodes them."""

from collections.abc import Callable, Mapping, Sequence

import torch

from checkpoints_convert.arguments import SHARD_BYTES
from checkpoints_convert.encoding import SAME_NAME, Cast, EncodedTensor, Encoding
from checkpoints_convert.file_writer import LARGEST_BLOCK
from checkpoints_convert.formats.grid_encoding import GridEncoding
from checkpoints_convert.formats.quantized_format import QuantizedFormat, is_quantized
from checkpoints_convert.hf_directory import SINGLE
from checkpoints_convert.output import OutputFile, OutputTensor, RowSpan, encoded_tensors, pack, safetensors_file
from checkpoints_convert.quantize.solved import SolvedLayers
from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf.mapping import hf_tensors

_SHOWN = 10
# Rows of a weight are encoded in steps of this many bytes of float32 where a tensor is made of all of them.
_STEP_BYTES = LARGEST_BLOCK


def plan_files(
    weights: TensorSet,
    model: ModelConfig,
    format_: QuantizedFormat,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int | None = None,
    solved: SolvedLayers | None = None,
) -> list[OutputFile]:
    """The safetensors files.

    Args:
        weights: of the source, in the shape that is written.
        model: that shape.
        format_: of the linear layers.
        dtype: of all other tensors.
        max_shard_bytes: size at which a file is begun; None is 5 GB.
        solved: codes and altered tensors of a calibrated method; None rounds to nearest.

    Raises:
        ConversionError: the format cannot hold a weight, with all that it cannot.
    """
    items = hf_tensors(model)
    require_shapes(model, format_)
    outputs: list[list[OutputTensor]] = []
    for item in items:
        if not is_quantized(item.name):
            outputs.append(_kept(weights, item.name, item.shape, dtype, solved))
        elif solved is not None:
            outputs.append(_stored(item.name, item.shape, format_, solved))
        else:
            outputs.append(_rounded(weights, item.name, item.shape, format_.encoding()))
    sizes = [sum(output.value_bytes for output in group) for group in outputs]
    groups = pack(outputs, sizes, limit=max_shard_bytes or SHARD_BYTES)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [
        safetensors_file(name, [output for tensors in group for output in tensors])
        for name, group in zip(names if count > 1 else [SINGLE], groups, strict=True)
    ]


def require_shapes(model: ModelConfig, format_: QuantizedFormat) -> None:
    """Raises ConversionError where a format cannot hold a weight; of weights alike in all layers one is named."""
    problems: dict[tuple[str, tuple[int, ...]], Problem] = {}
    for item in hf_tensors(model):
        kind = (item.name.split(".")[-2], item.shape)
        if is_quantized(item.name) and kind not in problems:
            assert len(item.shape) == 2, item.name
            if (problem := format_.shape_problem(item.name, (item.shape[0], item.shape[1]))) is not None:
                problems[kind] = Problem(f"{format_.name}: {problem.where}", problem.value, problem.fix)
    if problems:
        raise ConversionError(list(problems.values())[:_SHOWN])


def _kept(
    weights: TensorSet, name: str, shape: tuple[int, ...], dtype: torch.dtype, solved: SolvedLayers | None
) -> list[OutputTensor]:
    """A tensor that is only cast."""

    def read(start: int, stop: int) -> torch.Tensor:
        changed = None if solved is None else solved.changed(name)
        return weights.rows(name, start, stop) if changed is None else changed[start:stop]

    return encoded_tensors(name, shape, [RowSpan(shape[0], read)], Cast(dtype))


def _rounded(weights: TensorSet, name: str, shape: tuple[int, ...], encoding: Encoding) -> list[OutputTensor]:
    """A weight that is rounded to nearest while it is read."""
    whole = RowSpan(shape[0], lambda start, stop: weights.rows(name, start, stop))
    side_rows = encoding.side_rows if isinstance(encoding, GridEncoding) else None
    if side_rows is None:
        return encoded_tensors(name, shape, [whole], encoding)

    def gathered(part: str, made: EncodedTensor) -> Callable[[], torch.Tensor]:
        return made.value or (lambda: _side_by_side(whole, shape, encoding, part, made, side_rows, name))

    parts = encoding.tensors(shape)
    return [_at_once(_part_name(name, part), made, gathered(part, made)) for part, made in parts.items()]


def _side_by_side(
    span: RowSpan, shape: tuple[int, ...], encoding: Encoding, part: str, made: EncodedTensor, side_rows: int, name: str
) -> torch.Tensor:
    """A tensor that has the input dimension first, from blocks of the weight's rows, which are columns of it.

    So only what is written is in memory as a whole, a quarter or half of a bf16 weight, and not the weight.
    """
    found = torch.empty(made.shape, dtype=made.dtype)
    row_bytes = torch.Size(shape[1:]).numel() * encoding.working_dtype.itemsize
    step = max(1, _STEP_BYTES // max(1, side_rows * row_bytes)) * side_rows
    columns = made.shape[-1]
    for start in range(0, span.rows, step):
        stop = min(span.rows, start + step)
        block = encoding.encode(span.read(start, stop), name=name)[part]
        found[..., start * columns // span.rows : stop * columns // span.rows] = block
    return found


def _stored(name: str, shape: tuple[int, ...], format_: QuantizedFormat, solved: SolvedLayers) -> list[OutputTensor]:
    """A weight whose codes a calibrated method has found."""

    def packed(part: str, made: EncodedTensor) -> torch.Tensor:
        parts: Mapping[str, torch.Tensor] = format_.pack(solved.linear(name))
        found = parts["weight" if part == SAME_NAME else part]
        assert (found.shape, found.dtype) == (made.shape, made.dtype), (name, part, found.shape, made.shape)
        return found

    def maker(part: str, made: EncodedTensor) -> Callable[[], torch.Tensor]:
        return lambda: packed(part, made)

    parts = format_.encoding().tensors(shape)
    codes = torch.Size(shape).numel()
    return [_at_once(_part_name(name, part), made, maker(part, made), more=codes) for part, made in parts.items()]


def _at_once(name: str, made: EncodedTensor, value: Callable[[], torch.Tensor], *, more: int = 0) -> OutputTensor:
    """A tensor that is made and written as a whole: as one row.

    Args:
        name: in the file.
        made: its shape and format.
        value: makes it.
        more: bytes that are in memory while it is made.
    """
    row = RowSpan(1, lambda start, stop: value()[None])
    held = torch.Size(made.shape).numel() * made.dtype.itemsize + more
    return OutputTensor(name, made.shape, made.dtype, (row,), Cast(made.dtype), held_bytes=held)


def _part_name(name: str, part: str) -> str:
    return name if part == SAME_NAME else f"{name.rpartition('.')[0]}.{part}"


def weights_in(model: ModelConfig) -> int:
    """How many weights a model has, all tensors together."""
    return sum(torch.Size(item.shape).numel() for item in hf_tensors(model))


def bits_a_weight(files: Sequence[OutputFile], model: ModelConfig) -> float:
    """Bits on the disk for each weight of the model, embeddings and scales included."""
    return 8 * sum(file.size for file in files) / weights_in(model)
