"""Text to token files."""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from megatron_qwen.data.token_file import TokenFile, TokenFileWriter
from megatron_qwen.data.tokenizer import fingerprint, load_tokenizer
from megatron_qwen.errors import ConfigError, DataError, Problem

_BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class Prepared:
    """What a preparation made; written beside the token file as PREFIX.json.

    Args:
        documents: documents written.
        empty_documents: documents without text, left out.
        tokens: tokens written, end-of-document tokens included.
        characters: characters read.
        vocab_size: one more than the largest id the tokenizer has.
        end_of_text: id after every document.
        tokenizer_sha256: of the tokenizer's file.
        bin_xxh3_128: of the .bin.
    """

    documents: int
    empty_documents: int
    tokens: int
    characters: int
    vocab_size: int
    end_of_text: int
    tokenizer_sha256: str
    bin_xxh3_128: str


def prepare(
    texts: Iterable[str], *, tokenizer: Path, prefix: Path, on_progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """Tokenizes documents into PREFIX.bin / PREFIX.idx, each followed by the end-of-text token.

    Args:
        texts: documents; read once, a batch at a time.
        tokenizer: tokenizer directory.
        prefix: path of the token file without ending.
        on_progress: called with documents and tokens so far.

    Raises:
        DataError: there is no text at all.
    """
    encoder = load_tokenizer(tokenizer)
    counts = {"documents": 0, "empty_documents": 0, "tokens": 0, "characters": 0}
    with TokenFileWriter(prefix, vocab_size=encoder.vocab_size) as writer:
        for batch in itertools.batched(texts, _BATCH_DOCUMENTS):
            full = [text for text in batch if text]
            counts["empty_documents"] += len(batch) - len(full)
            for text, ids in zip(full, encoder.encode_batch(full), strict=True):
                writer.add([*ids, encoder.end_of_text])
                counts["documents"] += 1
                counts["tokens"] += len(ids) + 1
                counts["characters"] += len(text)
            if on_progress is not None:
                on_progress(counts["documents"], counts["tokens"])
        if not counts["documents"]:
            raise DataError(Problem(str(prefix), None, "the input holds no text; nothing was written."))
    done = Prepared(
        **counts,
        vocab_size=encoder.vocab_size,
        end_of_text=encoder.end_of_text,
        tokenizer_sha256=fingerprint(tokenizer),
        bin_xxh3_128=writer.digest,
    )
    temporary = manifest_path(prefix).with_suffix(".json.tmp")
    temporary.write_text(json.dumps(asdict(done), indent=2) + "\n")
    temporary.replace(manifest_path(prefix))
    return done


def require_free(prefix: Path) -> None:
    """Raises ConfigError where anything lies already that ``prepare`` would write."""
    paths = (
        [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx", ".json")] if prefix.name else [prefix]
    )
    if there := [path for path in paths if path.exists()]:
        raise ConfigError(
            [Problem("--output", path, "exists already; name another prefix or remove it.") for path in there]
        )


def manifest_path(prefix: str | Path) -> Path:
    """Where ``prepare`` notes what it made."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".json")


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """What is known of a token file; None for one that another program made."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        for item in fields(Prepared):
            if not isinstance(content[item.name], item.type):  # type: ignore[arg-type]
                raise TypeError
    except (ValueError, KeyError, TypeError):
        raise DataError(Problem(str(path), None, "is damaged; prepare the data again.")) from None
    return content


def verify(prefix: Path) -> TokenFile:
    """Reads everything and compares with the manifest.

    Raises:
        DataError: a byte, a count or the index is not as it was written.
    """
    file, noted = TokenFile(prefix), read_manifest(prefix)
    if noted is None:
        raise DataError(
            Problem(str(manifest_path(prefix)), None, "is missing: there is nothing to compare the tokens with.")
        )
    problems = []
    if damage := file.index_damage():
        problems.append(Problem(f"{prefix}.idx", None, f"is damaged: {damage}."))
    for name, found in (("tokens", file.num_tokens), ("documents", file.num_documents)):
        if noted[name] != found:
            problems.append(Problem(f"{prefix}: {name}", found, f"the manifest says {noted[name]}."))
    digest = xxhash.xxh3_128()
    with prefix.with_name(prefix.name + ".bin").open("rb") as stored:
        while chunk := stored.read(1 << 24):
            digest.update(chunk)
    if digest.hexdigest() != noted["bin_xxh3_128"]:
        problems.append(Problem(f"{prefix}.bin", None, "has other bytes than when it was written: damaged."))
    if problems:
        raise DataError(problems)
    return file
