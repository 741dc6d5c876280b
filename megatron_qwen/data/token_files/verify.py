"""The full check of token files: every byte, every count, the whole index; in bounded memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_qwen.data.token_files.manifest import Manifest, file_digest, manifest_path, read_manifest, with_ending
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.errors import DataError, Problem

_TOKENS = 1 << 22


def verify(prefix: Path, on_file: Callable[[Path], None] = lambda _: None) -> Manifest:
    """Reads a token file, or all files of a set, and compares them with the manifest.

    Args:
        prefix: of the file or the set.
        on_file: called before each token file.

    Returns:
        The manifest.

    Raises:
        DataError: a hash, a count, a token or the index is wrong; every such file is named.
    """
    noted = read_manifest(prefix)
    if noted is None:
        fix = "is missing, so there is nothing to verify the tokens against."
        raise DataError(Problem(str(manifest_path(prefix)), None, fix))
    problems: list[Problem] = []
    members = [prefix.with_name(name) for name in noted.shards] or [prefix]
    found = {"documents": 0, "tokens": 0}
    for member in members:
        on_file(member)
        try:
            own = noted if member == prefix else read_manifest(member)
            if own is None:
                raise DataError(Problem(str(manifest_path(member)), None, "is missing."))
            file = TokenFile(member)
        except DataError as error:
            problems += error.problems
            continue
        problems += _member_problems(member, own, file)
        found["documents"] += file.num_documents
        found["tokens"] += file.num_tokens
    if noted.shards and not problems:
        for name, count in found.items():
            if getattr(noted, name) != count:
                problems.append(Problem(f"{prefix}: {name}", count, f"the manifest says {getattr(noted, name)}."))
    if problems:
        raise DataError(problems)
    return noted


def _member_problems(prefix: Path, noted: Manifest, file: TokenFile) -> Iterator[Problem]:
    for name, count in (("documents", file.num_documents), ("tokens", file.num_tokens)):
        if getattr(noted, name) != count:
            yield Problem(f"{prefix}: {name}", count, f"the manifest says {getattr(noted, name)}.")
    if damage := file.index_damage():
        yield Problem(f"{prefix}.idx", None, f"is damaged: {damage}.")
    elif noted.idx_xxh3_128 not in (None, file_digest(with_ending(prefix, ".idx"))):
        yield Problem(f"{prefix}.idx", None, "does not match its checksum in the manifest: damaged.")
    if file_digest(with_ending(prefix, ".bin")) != noted.bin_xxh3_128:
        yield Problem(f"{prefix}.bin", None, "does not match its checksum in the manifest: damaged.")
    if (where := foreign_token(file, noted.vocab_size)) is not None:
        yield where
    mask = with_ending(prefix, ".mask")
    if noted.mask_xxh3_128 is not None and (not mask.is_file() or file_digest(mask) != noted.mask_xxh3_128):
        yield Problem(str(mask), None, "is missing, or does not match its checksum in the manifest.")


def foreign_token(file: TokenFile, vocab_size: int) -> Problem | None:
    """A problem that names the first token whose id is outside of the vocabulary; None if there is none."""
    for start in range(0, file.num_tokens, _TOKENS):
        tokens = file.tokens(start, min(start + _TOKENS, file.num_tokens))
        wrong = (tokens < 0) | (tokens >= vocab_size)
        if wrong.any():
            position = start + int(np.argmax(wrong))
            document = file.document_at(position)
            fix = f"is not an id of the vocabulary of {vocab_size} (document {document}, token {position})."
            return Problem(f"{file.prefix}.bin", int(tokens[position - start]), fix)
    return None
