"""``mq convert to-hf``: a checkpoint as a directory that transformers loads."""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from checkpoints_convert import work
from checkpoints_convert.answering import answer_ends, answering_files
from checkpoints_convert.arguments import SHARD_BYTES
from checkpoints_convert.checkpoint_source import CheckpointSource, damaged
from checkpoints_convert.conversion import DTYPES, Converted, predict
from checkpoints_convert.encoding import Cast, Encoding
from checkpoints_convert.exported_config import exported_config
from checkpoints_convert.exported_ids import does_not_stop, new_generation
from checkpoints_convert.hf_directory import CONFIG, GENERATION, INDEX, SINGLE
from checkpoints_convert.model_card import model_card
from checkpoints_convert.origin import checkpoint_origin, data_origin, local_path_in, published_configuration
from checkpoints_convert.output import OutputFile, RowSpan, encoded_tensors, pack, safetensors_file
from checkpoints_convert.progress import ByteProgress
from checkpoints_convert.release import is_complete
from checkpoints_convert.released_directory import confirmed_loader, index_text, json_text, release
from checkpoints_convert.source_check import check_unread
from checkpoints_convert.tensor_set import ExportedWeights
from megatron_qwen.data.tokenizers.release import AUTO, NOT_TRIED, Loader, LoaderSearch
from megatron_qwen.errors import CheckpointError
from megatron_qwen.hf.kept import keys_with_effect
from megatron_qwen.hf.mapping import HfTensor, hf_tensors
from megatron_qwen.provenance import code_version

log = logging.getLogger(__name__)
_WEIGHT_FILE = re.compile(r"model[A-Za-z0-9_-]*\.safetensors")


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Args:
        dtype: bf16, fp16 or fp32; None keeps what the checkpoint holds.
        max_shard_bytes: size at which a new safetensors file is begun; None is 5 GB, or the files that the model
            had when it was converted from Hugging Face.
        workers: files written at a time.
        license_: for the model card.
        local_paths: name data, tokenizer and checkpoint by their paths on this machine in what is published.
        check_everything: check what is not exported (the optimizer's state) against the manifest, too.
        restart: throw away an unfinished conversion of something else to the same place.
        quiet: show no progress.
    """

    dtype: str | None = None
    max_shard_bytes: int | None = None
    workers: int = 2
    license_: str | None = None
    local_paths: bool = False
    check_everything: bool = True
    restart: bool = False
    quiet: bool = False


def export(source: CheckpointSource, out: Path, options: ExportOptions) -> Converted:
    """Writes ``out``, which appears only when it is complete; resumes what an earlier attempt left.

    Raises:
        ConversionError: ``out`` is occupied, or no class of transformers has this architecture.
        CheckpointError: the checkpoint is damaged.
        DiskFullError: there is not enough room.
    """
    files = plan_files(source, options)
    config = exported_config(source, dtype=_dtype(files))
    with LoaderSearch(source.tokenizer, config) as loaders:
        return _export(source, out, options, files=files, config=config, loaders=loaders)


def _export(
    source: CheckpointSource,
    out: Path,
    options: ExportOptions,
    *,
    files: list[OutputFile],
    config: dict[str, Any],
    loaders: LoaderSearch,
) -> Converted:
    origin = {
        "source": checkpoint_origin(source, local_paths=options.local_paths),
        "data": data_origin(source, local_paths=options.local_paths),
        "configuration": published_configuration(source.config, local_paths=options.local_paths),
    }

    def texts_for(loader: Loader) -> dict[str, str]:
        return _texts(source, files, options, config=config, loader=loader, name=out.name, origin=origin)

    _tell(source, config, loaders, local_paths=options.local_paths)
    texts = texts_for(loaders.expected)
    identity = _identity(source, options, texts, loaders.files, origin)
    total = sum(output.value_bytes for file in files for output in file.tensors)
    if is_complete(out, identity):
        work.clear_notes(out)
        return Converted(out, total, total, 0.0, True, None)
    with work.begin(out, identity, restart=options.restart) as task:
        task.require_room(files)
        loaders.begin()
        prediction = predict(task, files, out, new_digest=hashlib.sha256, workers=options.workers)
        log.info("%s", prediction)
        unread = source.unread_parts() if options.check_everything else []
        progress = ByteProgress(total + sum(length for _, _, length, _ in unread), quiet=options.quiet)
        try:
            if options.check_everything:
                check_unread(source, unread, task.notes, workers=options.workers, progress=progress)
            written = task.write(files, new_digest=hashlib.sha256, workers=options.workers, progress=progress)
        except CheckpointError as error:
            raise damaged(source.path, error) from None
        finally:
            progress.close()
        if (loader := confirmed_loader(loaders)) != loaders.expected:
            # The identity stays that of the expected class: which is found depends on the version of transformers.
            texts = texts_for(loader)
            _tell_of_loader(loader)
        # The later ones win: a generation_config.json next to the tokenizer may be of another model.
        small_files = loaders.files | {name: text.encode() for name, text in texts.items()}
        kept = release(task, files, written, small_files, origin=origin, identity=identity)
    return Converted(out, total, kept, progress.seconds, False, prediction)


def plan_files(
    source: CheckpointSource, options: ExportOptions, *, encoding: Callable[[HfTensor], Encoding] | None = None
) -> list[OutputFile]:
    """The safetensors files: which tensors go where, and which rows they are made of.

    Args:
        source: the checkpoint.
        options: how to export.
        encoding: how each tensor is written; None casts all to the format of the options.
    """
    weights = ExportedWeights(source.weights)

    def cast(item: HfTensor) -> Cast:
        return Cast(DTYPES[options.dtype] if options.dtype else source.weights.dtype(item.mapping.core))

    items = hf_tensors(source.config.model)
    outputs = {
        item.name: encoded_tensors(
            item.name, item.shape, [_piece(weights, item, *span) for span in item.rows], (encoding or cast)(item)
        )
        for item in items
    }

    def file(name: str, group: Sequence[HfTensor]) -> OutputFile:
        return safetensors_file(name, [output for item in group for output in outputs[item.name]])

    if options.max_shard_bytes is None and (before := _files_before(source, items)):
        return [file(name, group) for name, group in before.items()]
    sizes = [sum(output.value_bytes for output in outputs[item.name]) for item in items]
    groups = pack(items, sizes, limit=options.max_shard_bytes or SHARD_BYTES)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [file(name, group) for name, group in zip(names if count > 1 else [SINGLE], groups, strict=True)]


def _files_before(source: CheckpointSource, items: Sequence[HfTensor]) -> dict[str, list[HfTensor]] | None:
    """By file, what lay in it when the model was converted from Hugging Face; None where that is not known."""
    files = _converted_from(source).get("files")
    by_name = {item.name: item for item in items}
    if not isinstance(files, dict) or not all(isinstance(names, list) for names in files.values()):
        return None
    # What a checkpoint says names files here: bare names of weights, nothing else.
    if not all(_WEIGHT_FILE.fullmatch(str(file)) for file in files):
        return None
    if sorted(str(name) for names in files.values() for name in names) != sorted(by_name):
        return None
    return {file: [by_name[name] for name in names] for file, names in sorted(files.items())}


def _converted_from(source: CheckpointSource) -> dict[str, Any]:
    """What a checkpoint notes of the directory it was converted from."""
    noted = source.state.get("converted_from")
    return noted if isinstance(noted, dict) else {}


def _piece(weights: ExportedWeights, item: HfTensor, first: int, last: int) -> RowSpan:
    return RowSpan(last - first, lambda start, stop: weights.core_rows(item, first + start, first + stop))


def _dtype(files: Sequence[OutputFile]) -> str:
    """torch's name of the weights' widest format."""
    formats = {output.dtype for file in files for output in file.tensors}
    return str(max(formats, key=lambda item: item.itemsize)).removeprefix("torch.")


def _texts(
    source: CheckpointSource,
    files: Sequence[OutputFile],
    options: ExportOptions,
    *,
    config: dict[str, Any],
    loader: Loader,
    name: str,
    origin: dict[str, Any],
) -> dict[str, str]:
    """The text files next to the weights, by name; the tokenizer's are not among them."""
    texts = {CONFIG: json_text(config)}
    if (generation := new_generation(source, config)) is not None:
        texts[GENERATION] = json_text(generation)
    texts |= {name: json_text(content) for name, content in answering_files(source).items()}
    texts["README.md"] = model_card(
        source,
        name=name,
        architecture=config["architectures"][0],
        tokenizer_class=loader.name or AUTO,
        dtype=config.get("torch_dtype") or config["dtype"],
        license_=options.license_,
        checkpoint=origin["source"],
        data=origin["data"],
    )
    if [file.name for file in files] != [SINGLE]:
        texts[INDEX] = index_text(files)
    return texts


def _tell(source: CheckpointSource, config: dict[str, Any], loaders: LoaderSearch, *, local_paths: bool) -> None:
    """Says what whoever releases the directory has to know."""
    if effects := keys_with_effect(config):
        fix = "kept in config.json, and not computed in training: what they change was not trained"
        log.warning("%s: %s", ", ".join(effects), fix)
    if source.tokenizer is None:
        log.warning("the run names no tokenizer (data.tokenizer): the export has none")
        return
    if GENERATION in loaders.files and new_generation(source, config) is not None:
        fix = "is of another model: it has token ids that the vocabulary does not have. The export has one of its own"
        if answer_ends(source) is not None:
            fix = "does not stop at the end of a turn, as a base model's. The export has one of its own"
        log.warning("%s next to the tokenizer %s", GENERATION, fix)
    if source.config.objective.kind != "pretrain" and answer_ends(source) is None:
        fix = "so the export cannot say where answers end, and may not stop; name the run's own tokenizer (--tokenizer)"
        log.warning("the tokenizer has no chat template whose turns end with a token of its own: %s", fix)
    if (why := does_not_stop(source, config)) is not None:
        log.warning("%s", why)
    if not local_paths and (told := local_path_in(source.tokenizer)):
        fix = "its files are exported byte for byte. Name a copy without it (--tokenizer) before you publish"
        log.warning("tokenizer_config.json holds the local path %s, and %s", told, fix)
    written = source.tokenizer / "tokenizer.json"
    if written.is_file() and loaders.files[written.name] != written.read_bytes():
        fix = "is switched off in the export, as it is when data are prepared: with it, ids differ from call to call"
        log.warning("dropout of merges in %s %s", written.name, fix)
    _tell_of_loader(loaders.expected)


def _tell_of_loader(loader: Loader) -> None:
    if loader.name is None:
        log.warning("the tokenizer was not loaded as users of the release will load it: %s", NOT_TRIED)
    elif loader.passed_over is not None:
        fix = f"AutoTokenizer does not load this tokenizer rightly ({loader.passed_over})"
        log.warning("%s: load it with %s, as the model card and `mq generate` do", fix, loader.name)


def _identity(
    source: CheckpointSource,
    options: ExportOptions,
    texts: dict[str, str],
    tokenizer: Mapping[str, bytes],
    origin: dict[str, Any],
) -> dict[str, Any]:
    """All that decides the bytes of the directory."""
    return {
        "kind": "to-hf",
        **origin,
        "dtype": options.dtype,
        "max_shard_bytes": options.max_shard_bytes,
        "texts": {name: xxhash.xxh3_128_hexdigest(text.encode()) for name, text in sorted(texts.items())},
        "tokenizer": {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.items()},
        "code": code_version(),
    }
