"""``mq convert verify``: whether two things are the same model, tensor by tensor."""

import itertools
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.answering import end_of_answers
from checkpoints_convert.checkpoint_source import damaged
from checkpoints_convert.compare.gguf_weights import GgufComparison, GgufSummary, tokenizer_differences
from checkpoints_convert.compare.grid_error import GridError
from checkpoints_convert.compare.logits import LogitComparison, compare, prompt_tokens
from checkpoints_convert.compare.quantized_limits import largest_divergence
from checkpoints_convert.compare.quantized_weights import WeightComparison, WeightSummary
from checkpoints_convert.compare.sides import Side
from checkpoints_convert.compare.tensor_difference import Difference, value_difference
from checkpoints_convert.hf_directory import GENERATION
from checkpoints_convert.layerwise.layered import LayeredModel
from checkpoints_convert.progress import ByteProgress, gb
from checkpoints_convert.quantize.padding import padding_between
from checkpoints_convert.release import MANIFEST
from checkpoints_convert.source_check import require_whole
from checkpoints_convert.tensor_set import digest
from megatron_qwen.data.tokenizers.release import NOT_TRIED, loader_of
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import CheckpointError, ConversionError, DataError, Problem
from megatron_qwen.hf.kept import IDS, keys_with_effect

log = logging.getLogger(__name__)
WORST = 10
# Of config.json, what does not change what a model computes.
_NOT_COMPUTED = ("initializer_range", "router_aux_loss_coef", "torch_dtype", "architectures", "use_cache")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class VerifyResult:
    """What a comparison found.

    Args:
        tensors: how many were compared.
        equal_tensors: of these, how many have equal bits; of a model and its quantized release, those that are not
            quantized and are equal but for a change of dtype.
        bytes_compared: on one side.
        tolerance: largest relative difference that passes; 0 wants equal bits.
        differences: everything that differs.
        logits: of both models, where asked for.
        sizes: of each side that has weights: its path, bytes and weights.
        quantized: of a model and its quantized release.
        padding: widths that the release has zeros up to, in words; None where it has the model's.
    """

    tensors: int = 0
    equal_tensors: int = 0
    bytes_compared: int = 0
    tolerance: float = 0.0
    differences: list[Difference] = field(default_factory=list)
    logits: LogitComparison | None = None
    sizes: list[tuple[str, int, int]] = field(default_factory=list)
    quantized: WeightSummary | GgufSummary | None = None
    padding: str | None = None

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
        if self.padding is not None:
            lines.append(f"padded: {self.padding}; values beyond the model's are compared with zeros")
        if self.quantized is not None:
            lines += [str(self.quantized), *(f"{path}: {_size(*size)}" for path, *size in self.sizes)]
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
            "sides": [
                {"path": path, "bytes": size, "weights": values, "bits_per_weight": 8 * size / max(1, values)}
                for path, size, values in self.sizes
            ],
            "quantized": None if self.quantized is None else self.quantized.as_json(),
            "padding": self.padding,
        }


def _size(size: int, values: int) -> str:
    return f"{gb(size)}, {8 * size / max(1, values):.2f} bits a weight"


def verify(a: Side, b: Side, *, tolerance: float = 0.0, workers: int = 2, quiet: bool = False) -> VerifyResult:
    """Compares tensors, configuration and tokenizer of two sides.

    Where one is quantized and the other is not, its weights are compared on their own grid (``quantized_weights``).

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
    if a.manifest is not None or b.manifest is not None:
        a, b = a.as_stored(), b.as_stored()
    sizes = [(str(side.path), side.weight_bytes, side.values) for side in (a, b)]
    (a, padded), (b, other_padded) = _padded(a, b), _padded(b, a)
    verdict = VerifyResult(tolerance=tolerance, sizes=sizes, padding=padded or other_padded)
    verdict.differences += _configurations(a, b) + _tokenizers(a, b) + _files(a, b) + _files(b, a)
    for name in sorted(a.described.keys() ^ b.described.keys()):
        where = a.path if name in a.described else b.path
        verdict.differences.append(Difference("tensor", name, f"is only in {where}"))
    names = [name for name in a.described if name in b.described]
    length = {name: _bytes(a, name) for name in names}
    # Of a checkpoint, what holds no weights is checked as well.
    unread = [(side.checkpoint, side.checkpoint.unread_parts()) for side in (a, b) if side.checkpoint is not None]
    others = sum(size for _, parts in unread for _, _, size, _ in parts)
    progress = ByteProgress(sum(length.values()) + others, quiet=quiet)

    release, file = _release(a, b, tolerance), _gguf(a, b)
    verdict.quantized = release.summary if release is not None else None if file is None else file.summary

    def one(group: list[str]) -> list[tuple[str, GridError | None, Difference | None]]:
        found = []
        for name in group:
            if release is not None:
                found.append((name, *release.compare(name)))
            else:
                found.append((name, None, _tensor(a, b, name, tolerance) if file is None else file.compare(name)))
            progress.add(length[name])
        return found

    try:
        for checkpoint, parts in unread:
            require_whole(checkpoint, parts, workers=workers, progress=progress)
        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
            groups = [[name] for name in names] if release is None else release.groups(names)
            for name, measured, difference in itertools.chain.from_iterable(pool.map(one, groups)):
                verdict.tensors += 1
                verdict.bytes_compared += length[name]
                verdict.equal_tensors += difference is None and measured is None
                if release is not None and measured is not None:
                    release.summary.errors.append(measured)
                own_limits = release is not None or file is not None
                if difference is not None and (own_limits or not tolerance or difference.size > tolerance):
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


def _padded(side: Side, other: Side) -> tuple[Side, str | None]:
    """A model in the shape of a release that is padded, and what was padded; itself where it is not."""
    if (
        not other.is_release
        or side.is_release
        or side.tensors is None
        or side.described.keys() != other.described.keys()
    ):
        return side, None
    padding = padding_between(side.model, other.model)
    return (side.padded(padding), padding.told(side.model)) if padding.widths else (side, None)


def _release(a: Side, b: Side, tolerance: float) -> WeightComparison | None:
    """Compares a model with its quantized release; None where not exactly one side is quantized."""
    for reference, other in ((a, b), (b, a)):
        if reference.tensors is not None and reference.quantized is None and other.quantized is not None:
            return WeightComparison(reference.tensors, other.quantized, reference.model, tolerance=tolerance)
    return None


def _gguf(a: Side, b: Side) -> GgufComparison | None:
    """Compares a model with a GGUF file of it; None where not exactly one side is one."""
    for reference, other in ((a, b), (b, a)):
        if reference.tensors is not None and reference.gguf is None and other.gguf is not None:
            if reference.quantized is not None:
                fix = "is quantized too: compare each with the model that both were made of."
                raise ConversionError(Problem(str(reference.path), None, fix))
            return GgufComparison(reference.tensors, other.gguf)
    return None


def compare_logits(a: Side, b: Side, *, prompts: Sequence[str], dtype: str, quiet: bool = False) -> LogitComparison:
    """Runs both models on prompts, each by its own implementation, layer by layer.

    A quantized side runs with dequantized weights in the dtype of the comparison; inputs of layers are not rounded.
    Where a side is quantized, the mean KL divergence decides, by a limit of its precision (``quantized_limits``).

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

    precisions = [side.quantized.scheme.precision for side in (a, b) if side.quantized is not None]
    precisions += [stored.type.name for side in (a, b) if side.gguf is not None for stored in side.gguf.stored.values()]
    limit = largest_divergence(precisions) if precisions else None
    return compare(first, second, tokens, dtype=dtype, kl_tolerance=limit, on_layer=show)


def _layers(side: Side, dtype: str) -> LayeredModel:
    from megatron_qwen import device

    if side.checkpoint is not None:
        from megatron_qwen.core_patches.install import prepare_process

        prepare_process()
        from checkpoints_convert.layerwise.layered_core import CoreLayers

        return CoreLayers(side.checkpoint.weights, side.architecture.rope, dtype=_DTYPES[dtype], place=device.current())
    from checkpoints_convert.layerwise.layered_hf import HfLayers

    # A quantized directory is one too: its rows are dequantized, a layer at a time.
    assert side.tensors is not None
    assert side.stated is not None
    return HfLayers(side.tensors, side.stated, dtype=_DTYPES[dtype], place=device.current())


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
    return value_difference(a.tensors, b.tensors, name)


def _configurations(a: Side, b: Side) -> list[Difference]:
    ours, theirs = a.config(), b.config()
    if a.stated is not None and b.stated is not None:
        # An id that one side leaves open is no difference: an export takes it from the tokenizer.
        ids = [name for name in IDS if a.stated.get(name) is not None and b.stated.get(name) is not None]
        ours |= {**keys_with_effect(a.stated), **{name: a.stated[name] for name in ids}}
        theirs |= {**keys_with_effect(b.stated), **{name: b.stated[name] for name in ids}}
    if a.generation is not None and b.generation is not None:
        for name in IDS:
            told = f"{GENERATION}: {name}"
            ours[told], theirs[told] = _set_of(a.generation.get(name)), _set_of(b.generation.get(name))
    return [
        Difference("configuration", name, f"is {ours.get(name)!r} and {theirs.get(name)!r}")
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and name not in _NOT_COMPUTED
    ]


def _set_of(ids: Any) -> Any:
    """Ids that end a text, of which the order says nothing, nor whether one of them is a list."""
    return sorted(ids, key=str) if isinstance(ids, list) else ids if ids is None else [ids]


def _tokenizers(a: Side, b: Side) -> list[Difference]:
    for side, other in ((a, b), (b, a)):
        if side.gguf is not None:
            if other.tokenizer_dir is None:
                return []
            return tokenizer_differences(side.gguf, other.tokenizer_dir, eos=end_of_answers(other.checkpoint))
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
    if other.kind == "huggingface" and _loads_alike(side, other):
        return []
    refusal = f"as transformers loads it, the tokenizer does not do what that of {other.path} does"
    try:
        reference = load_tokenizer(other.tokenizer_dir)
        loader = loader_of(side.path, reference, where=side.path, refusal=refusal, way_out="")
    except (ConversionError, DataError) as error:
        return [Difference("tokenizer", str(side.path), problem.fix) for problem in error.problems]
    if loader.name is None:
        log.warning("%s: the tokenizer was not loaded as its users will load it: %s", side.path, NOT_TRIED)
    return []


def _loads_alike(side: Side, other: Side) -> bool:
    """Whether transformers makes the same tokenizer of two directories with equal tokenizer files."""
    ours, theirs = side.stated or {}, other.stated or {}
    return all(ours.get(name) == theirs.get(name) for name in ("model_type", "tokenizer_class", "auto_map"))


def _files(manifest: Side, other: Side) -> list[Difference]:
    """Where a directory is compared with a manifest: every file by its SHA-256."""
    if manifest.manifest is None or other.kind != "huggingface":
        return []
    return [
        Difference("file", Path(problem.where).name, problem.fix)
        for problem in manifest.manifest.damage(other.path)
        if Path(problem.where).name != MANIFEST
    ]
