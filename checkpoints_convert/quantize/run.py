"""Writes one quantized release: a directory that appears only when it is complete."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from checkpoints_convert import work
from checkpoints_convert.answering import answering_files
from checkpoints_convert.conversion import DTYPES, Converted, predict, worker_bytes
from checkpoints_convert.formats.quantized_format import QuantizedFormat
from checkpoints_convert.hf_directory import CONFIG, GENERATION, INDEX, SINGLE
from checkpoints_convert.model_source import ModelSource
from checkpoints_convert.output import OutputFile
from checkpoints_convert.progress import ByteProgress, peak_resident_bytes
from checkpoints_convert.quantize.card import ReleaseFacts, quantized_card
from checkpoints_convert.quantize.padding import NO_PADDING, PaddedWeights, Padding
from checkpoints_convert.quantize.plan import bits_a_weight, plan_files
from checkpoints_convert.quantize.solved import SolvedLayers
from checkpoints_convert.release import is_complete
from checkpoints_convert.released_directory import confirmed_loader, index_text, json_text, release
from megatron_qwen.config.run import Architecture
from megatron_qwen.data.tokenizers.release import Loader, LoaderSearch
from megatron_qwen.errors import CheckpointError
from megatron_qwen.provenance import code_version

log = logging.getLogger(__name__)
# Fewer workers rather than more than this: a release is made next to a training run, or on a login node.
MEMORY_BYTES = 3 << 29  # 1.5 GiB
# The float formats that readers of GPTQ and AWQ want, as in Qwen's releases; bf16 for all others.
_FP16_METHODS = ("gptq", "awq")


@dataclass(frozen=True)
class QuantizeOptions:
    """How to write a release.

    Args:
        method: what makes the values: ``nearest`` or a calibrated method.
        dtype: bf16, fp16 or fp32 of all that is not quantized; None is what readers of the format want.
        padding: widths to reach.
        max_shard_bytes: size at which a file is begun; None is 5 GB.
        workers: files written at a time, at most.
        license_: for the model card.
        restart: throw away an unfinished conversion of something else to the same place.
        quiet: show no progress.
    """

    method: str
    dtype: str | None = None
    padding: Padding = NO_PADDING
    max_shard_bytes: int | None = None
    workers: int = 2
    license_: str | None = None
    restart: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Quantized:
    """A release that was written.

    Args:
        done: what the conversion did.
        facts: what is said of the release.
    """

    done: Converted
    facts: ReleaseFacts

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "format": self.facts.format_name,
            "method": self.facts.method,
            "bits_per_weight": round(self.facts.bits, 4),
            **self.done.as_json(),
        }


@dataclass(frozen=True)
class _Plan:
    """All that decides the bytes of a release, before any is written."""

    source: ModelSource
    format: QuantizedFormat
    options: QuantizeOptions
    architecture: Architecture
    files: list[OutputFile]
    config: dict[str, Any]
    facts: ReleaseFacts

    @property
    def total(self) -> int:
        """Bytes of all values."""
        return sum(output.value_bytes for file in self.files for output in file.tensors)


def quantize(
    source: ModelSource,
    out: Path,
    format_: QuantizedFormat,
    options: QuantizeOptions,
    *,
    solved: SolvedLayers | None = None,
) -> Quantized:
    """Writes ``out``, which appears only when it is complete; resumes what an earlier attempt left.

    Args:
        source: what to quantize.
        out: the directory.
        format_: in which format.
        options: how.
        solved: layers of a calibrated method; None rounds to nearest.

    Raises:
        ConversionError: ``out`` is occupied, or the format cannot hold a weight or its values.
        CheckpointError: the checkpoint is damaged.
        DiskFullError: there is not enough room.
    """
    plan = _plan(source, format_, options, solved)
    unquantized = {name: value for name, value in plan.config.items() if name != "quantization_config"}
    with LoaderSearch(source.tokenizer, unquantized) as loaders:
        return Quantized(_write(plan, out, loaders, solved), plan.facts)


def dtype_name(quantization: Mapping[str, Any]) -> str:
    """The format of all that is not quantized that readers want, by the ``quantization_config``."""
    return "fp16" if quantization["quant_method"] in _FP16_METHODS else "bf16"


def _plan(
    source: ModelSource, format_: QuantizedFormat, options: QuantizeOptions, solved: SolvedLayers | None
) -> _Plan:
    model = options.padding.model(source.model)
    quantization = format_.config(model)
    dtype = DTYPES[options.dtype or dtype_name(quantization)]
    files = plan_files(
        PaddedWeights(source.weights, model),
        model,
        format_,
        dtype=dtype,
        max_shard_bytes=options.max_shard_bytes,
        solved=solved,
    )
    config = source.config(dtype=str(dtype).removeprefix("torch."))
    config |= options.padding.config(source.model) | {"quantization_config": quantization}
    size = sum(file.size for file in files)
    facts = ReleaseFacts(format_.name, quantization, options.method, size, bits_a_weight(files, model))
    return _Plan(source, format_, options, replace(source.architecture, model=model), files, config, facts)


def _write(plan: _Plan, out: Path, loaders: LoaderSearch, solved: SolvedLayers | None) -> Converted:
    source, options, files = plan.source, plan.options, plan.files
    origin = _origin(plan)
    texts = _texts(plan, loaders.expected, name=out.name)
    identity = {
        "kind": "quantize",
        **origin,
        "format": plan.facts.config,
        "method": options.method,
        "solved": None if solved is None else solved.digest,
        "dtype": plan.config.get("torch_dtype", plan.config.get("dtype")),
        "max_shard_bytes": options.max_shard_bytes,
        "padding": dict(options.padding.widths),
        "texts": {name: xxhash.xxh3_128_hexdigest(text.encode()) for name, text in sorted(texts.items())},
        "tokenizer": {name: hashlib.sha256(content).hexdigest() for name, content in loaders.files.items()},
        "code": code_version(),
    }
    if is_complete(out, identity):
        work.clear_notes(out)
        return Converted(out, plan.total, plan.total, 0.0, True, None)
    with work.begin(out, identity, restart=options.restart) as task:
        task.require_room(files)
        loaders.begin()
        workers = _workers(files, options.workers)
        prediction = predict(task, files, out, new_digest=hashlib.sha256, workers=workers)
        log.info("%s: %s", plan.format.name, prediction)
        if solved is not None:
            solved.prepare()
        progress = ByteProgress(plan.total, quiet=options.quiet)
        try:
            written = task.write(files, new_digest=hashlib.sha256, workers=workers, progress=progress)
        except CheckpointError as error:
            raise source.explained(error) from None
        finally:
            progress.close()
        if (loader := confirmed_loader(loaders)) != loaders.expected:
            # The identity stays that of the expected class: which is found depends on the version of transformers.
            texts = _texts(plan, loader, name=out.name)
        small_files = loaders.files | {name: text.encode() for name, text in texts.items()}
        kept = release(task, files, written, small_files, origin=origin, identity=identity)
    return Converted(out, plan.total, kept, progress.seconds, False, prediction)


def _origin(plan: _Plan) -> dict[str, Any]:
    origin = plan.source.origin()
    configuration = dict(origin["configuration"])
    configuration["model"] = {**configuration["model"], **plan.options.padding.widths}
    return {**origin, "configuration": configuration}


def _workers(files: list[OutputFile], asked: int) -> int:
    """As many as were asked for, as long as the memory stays within its bound."""
    room = MEMORY_BYTES - peak_resident_bytes()
    workers = max(1, min(asked, len(files), room // worker_bytes(files)))
    if workers < min(asked, len(files)):
        log.info("%d files at a time, not %d: more would need over 1.5 GiB of memory", workers, asked)
    return workers


def _texts(plan: _Plan, loader: Loader, *, name: str) -> dict[str, str]:
    """The text files next to the weights, by name; the tokenizer's are not among them."""
    config = plan.config
    texts = {CONFIG: json_text(config), **plan.format.files(plan.architecture.model)}
    if (generation := plan.source.generation(config)) is not None:
        texts[GENERATION] = json_text(generation)
    texts |= {name: json_text(content) for name, content in answering_files(plan.source.checkpoint).items()}
    texts["README.md"] = quantized_card(
        plan.source,
        plan.facts,
        name=name,
        architecture=plan.architecture,
        model_class=config["architectures"][0],
        dtype=config.get("torch_dtype") or config["dtype"],
        tokenizer_class=loader.name,
        license_=plan.options.license_,
    )
    if [file.name for file in plan.files] != [SINGLE]:
        texts[INDEX] = index_text(plan.files)
    return texts
