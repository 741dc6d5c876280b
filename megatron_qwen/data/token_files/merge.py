"""Merges token files: linked as the shards of a set, or concatenated into one file."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_qwen.data.token_files.manifest import (
    MEMBERS,
    Manifest,
    chats_together,
    file_digest,
    read_manifest,
    with_ending,
    write_manifest,
)
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.data.token_files.token_index import write_index
from megatron_qwen.errors import ConfigError, DataError, Problem
from megatron_qwen.files import publish, sync_stream

_COPY_BYTES = 1 << 24
_DOCUMENTS = 1 << 20
_ENDINGS = (".bin", ".idx", ".mask", ".json")
_COUNTS = ("documents", "tokens", "read", "empty", "filtered", "skipped", "text_bytes")


def merge(prefixes: Sequence[Path], output: Path, *, single: bool) -> Manifest:
    """Merges token files or sets.

    Args:
        prefixes: what to merge, in order.
        output: prefix of the result.
        single: write one .bin and .idx. Otherwise the files become shards of a set by hard links, without copying
            tokens (except from another file system).

    Raises:
        DataError: they were made with different tokenizers, or one cannot be read.
        ConfigError: an output file exists already.
    """
    members = [member for prefix in prefixes for member in _members(prefix)]
    files = [TokenFile(member) for member, _ in members]
    noted = [manifest for _, manifest in members]
    _require_compatible(files, noted)
    names = [output] if single else [with_ending(output, f"_{index:05d}") for index in range(len(files))]
    paths = [with_ending(name, ending) for name in {output, *names} for ending in _ENDINGS]
    if there := sorted(path for path in paths if path.exists()):
        fix = "exists already; name another prefix or remove it."
        raise ConfigError([Problem("--output", path, fix) for path in there])
    output.parent.mkdir(parents=True, exist_ok=True)
    together = _together(noted)
    if single:
        made = _write_single(files, output, together)
    else:
        try:
            made = _link_all(files, noted, names, together)
        except BaseException:
            for path in paths:
                path.unlink(missing_ok=True)
            raise
    write_manifest(output, made)
    return made


def _link_all(
    files: Sequence[TokenFile], noted: Sequence[Manifest], names: Sequence[Path], together: Manifest
) -> Manifest:
    for file, manifest, name in zip(files, noted, names, strict=True):
        for ending in (".bin", ".idx", *([".mask"] if file.has_mask else [])):
            _link(with_ending(file.prefix, ending), with_ending(name, ending))
        write_manifest(name, manifest)
    digest = xxhash.xxh3_128("".join(manifest.bin_xxh3_128 for manifest in noted).encode()).hexdigest()
    return replace(together, bin_xxh3_128=digest, shards=[name.name for name in names])


def _members(prefix: Path) -> list[tuple[Path, Manifest]]:
    noted = read_manifest(prefix)
    if noted is None:
        fix = "has no manifest, so its tokenizer is not known. Prepare it with `mq data prepare`."
        raise DataError(Problem(str(prefix), None, fix))
    if not noted.shards:
        return [(prefix, noted)]
    return [item for name in noted.shards for item in _members(prefix.with_name(name))]


def _require_compatible(files: Sequence[TokenFile], noted: Sequence[Manifest]) -> None:
    problems = []
    for file, manifest in zip(files[1:], noted[1:], strict=True):
        if manifest.tokenizer_sha256 != noted[0].tokenizer_sha256:
            fix = f"was made with another tokenizer than {files[0].prefix}; their ids have different meanings."
            if (manifest.vocab_size, manifest.control_tokens) == (noted[0].vocab_size, noted[0].control_tokens):
                fix += (
                    " Or one of them was made by an older version, which noted the SHA-256 of the tokenizer's file:"
                    " prepare that one again."
                )
            problems.append(Problem(str(file.prefix), None, fix))
        elif manifest.end_of_text != noted[0].end_of_text:
            fix = f"ends documents with another token than {files[0].prefix} (id {noted[0].end_of_text})."
            problems.append(Problem(str(file.prefix), manifest.end_of_text, fix))
        elif file.loss_unit != files[0].loss_unit:
            fix = f"has other units of weights than {files[0].prefix}: prepare both with --message-weights, or neither."
            problems.append(Problem(str(file.prefix), f"1/{file.loss_unit}", fix))
        elif manifest.chat.get(MEMBERS) != noted[0].chat.get(MEMBERS):
            fix = f"and {files[0].prefix}: one has pairs of answers, the other has not."
            problems.append(Problem(str(file.prefix), None, fix))
        elif file.dtype != files[0].dtype:
            fix = f"has another token width than {files[0].prefix} ({files[0].dtype}); prepare it again."
            problems.append(Problem(str(file.prefix), file.dtype, fix))
    if problems:
        raise DataError(problems)


def _together(noted: Sequence[Manifest]) -> Manifest:
    masked = [manifest.mask_xxh3_128 for manifest in noted if manifest.mask_xxh3_128 is not None]
    return replace(
        noted[0],
        **{name: sum(getattr(manifest, name) for manifest in noted) for name in _COUNTS},
        control_tokens_in_text=" and ".join(sorted({manifest.control_tokens_in_text for manifest in noted})),
        encoder=", ".join(sorted({manifest.encoder for manifest in noted})),
        made_by=xxhash.xxh3_128("".join(manifest.made_by for manifest in noted).encode()).hexdigest(),
        idx_xxh3_128=None,
        mask_xxh3_128=xxhash.xxh3_128("".join(masked).encode()).hexdigest() if masked else None,
        spelled_control_tokens=dict(sum((Counter(one.spelled_control_tokens) for one in noted), Counter())),
        inputs=[item for manifest in noted for item in manifest.inputs],
        left_out=[item for manifest in noted for item in manifest.left_out],
        chat=chats_together([manifest.chat for manifest in noted]),
    )


def _write_single(files: Sequence[TokenFile], output: Path, together: Manifest) -> Manifest:
    # Fixed names, so that a merge after a kill overwrites what the killed one left, which may be terabytes.
    temporary = {ending: with_ending(output, f"{ending}.merging") for ending in (".bin", ".idx", ".mask")}
    masked = any(file.has_mask for file in files)
    try:
        digest = _concatenate([with_ending(file.prefix, ".bin") for file in files], temporary[".bin"])
        mask = _write_mask(files, temporary[".mask"]) if masked else None
        documents = sum(file.num_documents for file in files)
        write_index(temporary[".idx"], lambda: _lengths(files), documents=documents, dtype=files[0].dtype)
        index = file_digest(temporary[".idx"])
        for ending in (".bin", ".idx", *([".mask"] if masked else [])):
            publish(temporary[ending], with_ending(output, ending))
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return replace(together, bin_xxh3_128=digest, idx_xxh3_128=index, mask_xxh3_128=mask, shards=[])


def _concatenate(paths: Sequence[Path], target: Path) -> str:
    digest = xxhash.xxh3_128()
    with target.open("wb") as out:
        for path in paths:
            with path.open("rb") as source:
                while piece := source.read(_COPY_BYTES):
                    digest.update(piece)
                    out.write(piece)
        sync_stream(out)
    return digest.hexdigest()


def _write_mask(files: Sequence[TokenFile], target: Path) -> str:
    """Concatenates the masks; in a file without a mask every token carries loss."""
    with target.open("wb") as out:
        for file in files:
            for start in range(0, file.num_tokens, _COPY_BYTES):
                out.write(file.raw_mask(start, min(start + _COPY_BYTES, file.num_tokens)).data)
    return file_digest(target)


def _lengths(files: Sequence[TokenFile]) -> Iterator[npt.NDArray[np.int32]]:
    for file in files:
        for first in range(0, file.num_documents, _DOCUMENTS):
            yield file.lengths(first, min(first + _DOCUMENTS, file.num_documents))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        _concatenate([source], target)
