"""Writes a model as GGUF files of any kinds, in one directory.

Each kind reads the source's rows for itself: a file is written from front to back with one journal and one hash. The
page cache has the rows of the kinds that are written beside one another.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from checkpoints_convert import work
from checkpoints_convert.answering import end_of_answers
from checkpoints_convert.checkpoint_source import CheckpointSource, damaged
from checkpoints_convert.conversion import Converted, predict
from checkpoints_convert.formats.gguf.card import gguf_card
from checkpoints_convert.formats.gguf.ggml_library import require_library
from checkpoints_convert.formats.gguf.importances import Importances
from checkpoints_convert.formats.gguf.model_keys import model_keys
from checkpoints_convert.formats.gguf.names import gguf_tensors
from checkpoints_convert.formats.gguf.plan import PlannedKind, choose_types, plan_kind
from checkpoints_convert.formats.gguf.types import KINDS, GgmlType
from checkpoints_convert.formats.gguf.vocabulary import tokenizer_keys
from checkpoints_convert.origin import checkpoint_origin, data_origin, published_configuration
from checkpoints_convert.progress import ByteProgress
from checkpoints_convert.release import is_complete
from checkpoints_convert.released_directory import release
from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.config.run import Architecture
from megatron_qwen.errors import CheckpointError, ConversionError, Problem
from megatron_qwen.provenance import code_version

_PLAIN = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
_CARD = "README.md"


class GgufSource(Protocol):
    """What is quantized."""

    @property
    def path(self) -> Path:
        """As it was named."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def digest(self) -> str:
        """What tells it from every other source."""

    @property
    def architecture(self) -> Architecture:
        """Shape and RoPE."""

    @property
    def stated(self) -> Mapping[str, Any] | None:
        """config.json."""

    @property
    def tensors(self) -> TensorSet | None:
        """The weights, under Hugging Face names."""

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer's files."""

    @property
    def checkpoint(self) -> CheckpointSource | None:
        """What is known of a checkpoint; None of a directory."""


@dataclass(frozen=True)
class GgufOptions:
    """How to write GGUF files.

    Args:
        name: of the model; files begin with it. None: the name of the output directory.
        max_shard_bytes: size at which a new file is begun; None: one file of each kind.
        workers: files written at a time.
        threads: that rows are quantized with, over all files; None: one of each core.
        license_: for the model card and the files.
        importances: an importance matrix; what it takes to find it is done when the output is claimed.
        local_paths: name data and checkpoint by their paths on this machine in what is published.
        restart: throw away an unfinished conversion of something else to the same place.
        quiet: show no progress.
    """

    name: str | None = None
    max_shard_bytes: int | None = None
    workers: int = 2
    threads: int | None = None
    license_: str | None = None
    importances: Importances | None = None
    local_paths: bool = False
    restart: bool = False
    quiet: bool = False


def write_gguf(source: GgufSource, out: Path, kinds: Sequence[str], options: GgufOptions) -> Converted:
    """Writes ``out``, which appears only when it is complete; resumes what an earlier attempt left.

    Args:
        source: the model.
        out: directory of the files, with manifest.json and a model card.
        kinds: names of ``types.KINDS``.
        options: how.

    Raises:
        ConversionError: a kind is not known, a shape, a tokenizer or the architecture cannot be held, a value is not
            finite, xllamacpp is missing, or ``out`` is occupied.
        CheckpointError: the checkpoint is damaged.
        DiskFullError: there is not enough room.
    """
    threads = options.threads or os.cpu_count() or 1
    with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        planned = _plan(source, out, kinds, options, pool if threads > 1 else None)
        return _write(source, out, planned, options)


def require_gguf(source: GgufSource, out: Path, kinds: Sequence[str], options: GgufOptions) -> None:
    """Refuses what ``write_gguf`` would refuse of the model, before anything is written.

    Raises:
        ConversionError: as ``write_gguf``.
    """
    _plan(source, out, kinds, options, None)


def _write(source: GgufSource, out: Path, planned: list[PlannedKind], options: GgufOptions) -> Converted:
    files = [file for item in planned for file in item.files]
    origin = _origin(source, local_paths=options.local_paths)
    card = gguf_card(
        planned,
        name=options.name or out.name,
        directory=out.name,
        license_=options.license_,
        importances=options.importances is not None,
        source=origin["source"],
    )
    identity = _identity(planned, options, card, origin)
    total = sum(output.value_bytes for file in files for output in file.tensors)
    if is_complete(out, identity):
        work.clear_notes(out)
        return Converted(out, total, total, 0.0, True, None)
    with work.begin(out, identity, restart=options.restart) as task:
        task.require_room(files)
        workers = max(1, min(options.workers, len(files)))
        prediction = predict(task, files, out, new_digest=hashlib.sha256, workers=workers)
        if options.importances is not None:
            options.importances.prepare()
        progress = ByteProgress(total, quiet=options.quiet)
        try:
            written = task.write(files, new_digest=hashlib.sha256, workers=workers, progress=progress)
        except CheckpointError as error:
            raise damaged(source.path, error) from None
        finally:
            progress.close()
        kinds = {file.name: item.kind.name for item in planned for file in item.files}
        kept = release(
            task,
            files,
            written,
            {_CARD: card.encode()},
            origin=origin,
            identity=identity,
            tensor_name=lambda file, output: f"{kinds[file.name]}/{output.name}",
        )
    return Converted(out, total, kept, progress.seconds, False, prediction)


def _plan(
    source: GgufSource, out: Path, kinds: Sequence[str], options: GgufOptions, pool: ThreadPoolExecutor | None
) -> list[PlannedKind]:
    model = source.architecture.model
    _require(source, kinds, options)
    assert source.tensors is not None
    assert source.tokenizer_dir is not None
    eos = end_of_answers(source.checkpoint)
    vocabulary = tokenizer_keys(source.tokenizer_dir, source.stated or {}, vocab_size=model.vocab_size, eos=eos)
    name = options.name or out.name
    planned = []
    for kind in (KINDS[named] for named in dict.fromkeys(kinds)):
        tensors = choose_types(kind, model, importances=options.importances is not None)
        if any(item.type not in _PLAIN for item in tensors):
            require_library()
        keys = model_keys(source.architecture, kind, name=name, license_=options.license_) | vocabulary
        planned.append(
            plan_kind(
                source.tensors,
                tensors,
                kind,
                keys,
                name=name,
                max_shard_bytes=options.max_shard_bytes,
                importances=options.importances,
                pool=pool,
            )
        )
    return planned


def _require(source: GgufSource, kinds: Sequence[str], options: GgufOptions) -> None:
    """Raises ConversionError with everything that is wrong with a command."""
    known = ", ".join(KINDS)
    problems = [
        Problem("gguf", kind, f"is no kind of GGUF file; known: {known}.") for kind in kinds if kind not in KINDS
    ]
    if not kinds:
        problems.append(Problem("gguf", None, f"names no kind; known: {known}."))
    if source.tensors is None:
        problems.append(Problem(str(source.path), None, "has no weights; name a checkpoint or a model's directory."))
    if source.tokenizer_dir is None:
        fix = "has no tokenizer, and a GGUF file has one inside; name it (--tokenizer)."
        problems.append(Problem(str(source.path), None, fix))
    if (name := options.name) is not None and (not name or Path(name).name != name):
        problems.append(Problem("name", name, "must be a name of files, without a directory."))
    if options.importances is not None:
        tensors = {tensor.name: tensor for tensor in gguf_tensors(source.architecture.model)}
        problems += options.importances.problems(tensors)
    if problems:
        raise ConversionError(problems)


def _origin(source: GgufSource, *, local_paths: bool) -> dict[str, Any]:
    """Where the weights come from, for the manifest."""
    if source.checkpoint is not None:
        return {
            "source": checkpoint_origin(source.checkpoint, local_paths=local_paths),
            "data": data_origin(source.checkpoint, local_paths=local_paths),
            "configuration": published_configuration(source.checkpoint.config, local_paths=local_paths),
        }
    noted = {"kind": "huggingface", "name": source.name, "xxh3_128": source.digest}
    return {
        "source": noted | ({"path": str(source.path.absolute())} if local_paths else {}),
        "data": [],
        "configuration": asdict(source.architecture),
    }


def _identity(
    planned: Sequence[PlannedKind], options: GgufOptions, card: str, origin: dict[str, Any]
) -> dict[str, Any]:
    """All that decides the bytes of the directory; the headers have model, tokenizer and types in them."""
    return {
        "kind": "gguf",
        **origin,
        "files": {file.name: xxhash.xxh3_128_hexdigest(file.header) for item in planned for file in item.files},
        "importances": None if options.importances is None else options.importances.digest,
        "texts": {_CARD: xxhash.xxh3_128_hexdigest(card.encode())},
        "code": code_version(),
    }
