"""``mq convert verify``: whether two things are the same model, tensor by tensor."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.checkpoint_source import damaged
from checkpoints_convert.compare.layered import LayeredModel
from checkpoints_convert.compare.logits import LogitComparison, compare, prompt_tokens
from checkpoints_convert.compare.sides import Side
from checkpoints_convert.progress import ByteProgress, gb
from checkpoints_convert.release import MANIFEST
from checkpoints_convert.source_check import require_whole
from checkpoints_convert.tensor_set import TensorSet, blocks, digest
from megatron_qwen.data.tokenizers.release import loader_of
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import CheckpointError, ConversionError, DataError, Problem
from megatron_qwen.hf.kept import IDS, keys_with_effect

WORST = 10
# Of config.json, what does not change what a model computes.
_NOT_COMPUTED = ("initializer_range", "router_aux_loss_coef", "torch_dtype", "architectures", "use_cache")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Args:
        kind: ``tensor``, ``configuration``, ``tokenizer``, ``file`` or ``logits``.
        name: of what.
        detail: how.
        size: how far apart: of a tensor, the largest difference in units of its largest value; inf where that says
            nothing.
    """

    kind: str
    name: str
    detail: str
    size: float = float("inf")


@dataclass
class VerifyResult:
    """What a comparison found.

    Args:
        tensors: how many were compared.
        equal_tensors: of these, how many have equal bits.
        bytes_compared: on one side.
        tolerance: largest relative difference that passes; 0 wants equal bits.
        differences: everything that differs.
        logits: of both models, where asked for.
    """

    tensors: int = 0
    equal_tensors: int = 0
    bytes_compared: int = 0
    tolerance: float = 0.0
    differences: list[Difference] = field(default_factory=list)
    logits: LogitComparison | None = None

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def __str__(self) -> str:
        lines = [
            f"{'same' if self.same else 'DIFFERENT'}: {self.equal_tensors:,} of {self.tensors:,} tensors "
            f"({gb(self.bytes_compared)}) have equal bits"
            + (f", tolerance {self.tolerance:g}" if self.tolerance else "")
            + ("" if self.same else f"; {len(self.differences):,} differences")
        ]
        lines += [f"  {item.kind} {item.name}: {item.detail}" for item in self.worst()]
        if len(self.differences) > WORST:
            lines.append(f"  and {len(self.differences) - WORST:,} more")
        if self.logits is not None:
            lines.append(str(self.logits))
        return "\n".join(lines)

    def worst(self) -> list[Difference]:
        """The ten largest differences."""
        return sorted(self.differences, key=lambda item: -item.size)[:WORST]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "same": self.same,
            "tensors": self.tensors,
            "equal_tensors": self.equal_tensors,
            "bytes_compared": self.bytes_compared,
            "tolerance": self.tolerance,
            "differences": len(self.differences),
            "worst": [
                {**asdict(item), "size": None if item.size == float("inf") else item.size} for item in self.worst()
            ],
            "logits": None if self.logits is None else self.logits.as_json(),
        }


def verify(a: Side, b: Side, *, tolerance: float = 0.0, workers: int = 2, quiet: bool = False) -> VerifyResult:
    """Compares tensors, configuration and tokenizer of two sides.

    Args:
        a: the reference.
        b: the other.
        tolerance: 0 wants equal shapes, formats and bits; above, formats may differ and values may be so far apart,
            in units of the tensor's largest value.
        workers: tensors compared at a time.
        quiet: show no progress.

    Raises:
        CheckpointError: a checkpoint is damaged.
    """
    verdict = VerifyResult(tolerance=tolerance)
    verdict.differences += _configurations(a, b) + _tokenizers(a, b) + _files(a, b) + _files(b, a)
    for name in sorted(a.described.keys() ^ b.described.keys()):
        where = a.path if name in a.described else b.path
        verdict.differences.append(Difference("tensor", name, f"is only in {where}"))
    names = [name for name in a.described if name in b.described]
    sizes = {name: _bytes(a, name) for name in names}
    # Of a checkpoint, what holds no weights is checked as well.
    unread = [(side.checkpoint, side.checkpoint.unread_parts()) for side in (a, b) if side.checkpoint is not None]
    others = sum(length for _, parts in unread for _, _, length, _ in parts)
    progress = ByteProgress(sum(sizes.values()) + others, quiet=quiet)

    def one(name: str) -> tuple[str, Difference | None]:
        found = _tensor(a, b, name, tolerance)
        progress.add(sizes[name])
        return name, found

    try:
        for checkpoint, parts in unread:
            require_whole(checkpoint, parts, workers=workers, progress=progress)
        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
            for name, difference in pool.map(one, names):
                verdict.tensors += 1
                verdict.bytes_compared += sizes[name]
                verdict.equal_tensors += difference is None
                if difference is not None and (not tolerance or difference.size > tolerance):
                    verdict.differences.append(difference)
    except CheckpointError as met:
        error = met
        for side in (a, b):
            if side.checkpoint is not None:
                error = damaged(side.checkpoint.path, error)
        raise error from None
    finally:
        progress.close()
    return verdict


def compare_logits(a: Side, b: Side, *, prompts: Sequence[str], dtype: str, quiet: bool = False) -> LogitComparison:
    """Runs both models on prompts, each by its own implementation, layer by layer.

    Args:
        a: the reference.
        b: the other; of the same layers and vocabulary.
        prompts: texts; none runs the built-in ones, or random ids where no side has a tokenizer.
        dtype: ``fp32`` or ``bf16``, which both compute in.
        quiet: show no progress.

    Raises:
        ConversionError: a side is a manifest, or the shapes do not compare.
    """
    for side in (a, b):
        if side.tensors is None:
            raise ConversionError(Problem("--logits", side.path, "is a manifest: it has no weights to run."))
    if (a.model.num_layers, a.model.vocab_size) != (b.model.num_layers, b.model.vocab_size):
        fix = f"{a.path} and {b.path} differ in layers or vocabulary; their logits cannot be compared."
        raise ConversionError(Problem("--logits", None, fix))
    tokenizer = a.tokenizer_dir or b.tokenizer_dir
    tokens = prompt_tokens(prompts, tokenizer, vocab_size=a.model.vocab_size)
    first, second = _layers(a, dtype), _layers(b, dtype)
    live = sys.stderr.isatty() and not quiet

    def show(index: int) -> None:
        if live:
            end = "\n" if index + 1 == a.model.num_layers else ""
            print(f"\rlayer {index + 1} of {a.model.num_layers}", end=end, file=sys.stderr, flush=True)

    return compare(first, second, tokens, dtype=dtype, on_layer=show)


def _layers(side: Side, dtype: str) -> LayeredModel:
    from megatron_qwen import device

    if side.checkpoint is not None:
        from megatron_qwen.core_patches.install import prepare_process

        prepare_process()
        from checkpoints_convert.compare.layered_core import CoreLayers

        return CoreLayers(side.checkpoint.weights, side.architecture.rope, dtype=_DTYPES[dtype], place=device.current())
    from checkpoints_convert.compare.layered_hf import HfLayers
    from checkpoints_convert.hf_directory import HfDirectory

    assert isinstance(side.tensors, HfDirectory)
    return HfLayers(side.tensors, dtype=_DTYPES[dtype], place=device.current())


def _bytes(side: Side, name: str) -> int:
    shape, dtype, _ = side.described[name]
    item: int = getattr(torch, dtype).itemsize
    return torch.Size(shape).numel() * item


def _tensor(a: Side, b: Side, name: str, tolerance: float) -> Difference | None:
    """How a tensor differs; None where bits and format are equal."""
    (shape, dtype, noted), (other_shape, other_dtype, other_noted) = a.described[name], b.described[name]
    if shape != other_shape:
        return Difference("tensor", name, f"has the shapes {list(shape)} and {list(other_shape)}")
    if dtype != other_dtype and not tolerance:
        return Difference("tensor", name, f"has the dtypes {dtype} and {other_dtype}")
    if a.tensors is None or b.tensors is None:
        first = noted if a.tensors is None else digest(a.tensors, name)
        second = other_noted if b.tensors is None else digest(b.tensors, name)
        return None if first == second else Difference("tensor", name, "differs from the hash in its manifest")
    return _values(a.tensors, b.tensors, name)


def _values(a: TensorSet, b: TensorSet, name: str) -> Difference | None:
    largest = scale = 0.0
    count = different = 0
    for ours, theirs in blocks([a, b], name):
        count += ours.numel()
        if ours.dtype == theirs.dtype and torch.equal(_bits(ours), _bits(theirs)):
            scale = max(scale, float(ours.abs().max().float()))
            continue
        one, other = ours.float(), theirs.float()
        unequal = _bits(one) != _bits(other)
        different += int(unequal.sum())
        apart = (one - other).abs().where(unequal, 0.0)
        largest = max(largest, float(apart.nan_to_num(nan=torch.inf).max()))
        scale = max(scale, float(one.abs().max()))
    if not different:
        return None
    size = largest / scale if scale and largest != float("inf") else float("inf")
    detail = f"differs in {different:,} of {count:,} values, by {largest:.3e} at most ({size:.2e} of its largest value)"
    return Difference("tensor", name, detail, size)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Values as integers of their bits, so that -0 is not 0 and NaN is itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def _configurations(a: Side, b: Side) -> list[Difference]:
    ours, theirs = a.config(), b.config()
    if a.stated is not None and b.stated is not None:
        # An id that one side leaves open is no difference: an export takes it from the tokenizer.
        ids = [name for name in IDS if a.stated.get(name) is not None and b.stated.get(name) is not None]
        ours |= {**keys_with_effect(a.stated), **{name: a.stated[name] for name in ids}}
        theirs |= {**keys_with_effect(b.stated), **{name: b.stated[name] for name in ids}}
    return [
        Difference("configuration", name, f"is {ours.get(name)!r} and {theirs.get(name)!r}")
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and name not in _NOT_COMPUTED
    ]


def _tokenizers(a: Side, b: Side) -> list[Difference]:
    found = []
    # Hugging Face directories have a generation_config.json even where the run's tokenizer has none.
    for name in sorted((a.tokenizer.keys() | b.tokenizer.keys()) - {"generation_config.json"}):
        ours, theirs = a.tokenizer.get(name), b.tokenizer.get(name)
        if ours != theirs:
            detail = "differs" if ours and theirs else f"is only in {a.path if ours else b.path}"
            found.append(Difference("tokenizer", name, detail))
    if not found:
        for side, other in ((b, a), (a, b)):
            found += _loaded(side, other)
    return found


def _loaded(side: Side, other: Side) -> list[Difference]:
    """Whether the tokenizer of a Hugging Face directory, as its users load it, gives the ids of the other side's."""
    if side.kind != "huggingface" or side.tokenizer_dir is None or other.tokenizer_dir is None:
        return []
    try:
        loader_of(side.path, load_tokenizer(other.tokenizer_dir), where=side.path)
    except (ConversionError, DataError) as error:
        return [Difference("tokenizer", str(side.path), problem.fix) for problem in error.problems]
    return []


def _files(manifest: Side, other: Side) -> list[Difference]:
    """Where a directory is compared with a manifest: every file by its SHA-256."""
    if manifest.manifest is None or other.kind != "huggingface":
        return []
    return [
        Difference("file", Path(problem.where).name, problem.fix)
        for problem in manifest.manifest.damage(other.path)
        if Path(problem.where).name != MANIFEST
    ]
