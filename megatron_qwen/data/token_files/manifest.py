"""PREFIX.json beside a token file: what is in it, out of which text it was made, and its checksums."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import xxhash

from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import atomic_write_json

_COPY_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a token file, or of a set of them (shards).

    Every record read is a document, or is counted by why it is none:
    read = documents + empty + filtered + skipped.

    Args:
        documents: documents written.
        tokens: tokens written, end-of-document tokens included.
        read: records read.
        empty: records without text.
        filtered: records that a condition (``--where``) left out.
        skipped: bad records (``--on-error skip``); they lie in PREFIX.skipped.jsonl.
        text_bytes: UTF-8 bytes of the records.
        vocab_size: one more than the largest id the tokenizer has.
        end_of_text: id after every document.
        control_tokens: ids by name.
        tokenizer_sha256: of the tokenizer's file.
        encoder: what made the ids.
        bin_xxh3_128: of the .bin; of a set, over those of its shards.
        idx_xxh3_128: of the .idx; None for a set.
        mask_xxh3_128: of the .mask (a byte a token: whether it carries loss); None where there is none.
        shards: names of a set's token files, without ending, beside the manifest.
        options: how records were read.
        inputs: path and size of every input file.
        made_by: hash of all that decides the output; the same command finds its own work by it.
    """

    documents: int
    tokens: int
    read: int
    empty: int
    filtered: int
    skipped: int
    text_bytes: int
    vocab_size: int
    end_of_text: int
    control_tokens: dict[str, int]
    tokenizer_sha256: str
    encoder: str
    made_by: str
    bin_xxh3_128: str
    idx_xxh3_128: str | None = None
    mask_xxh3_128: str | None = None
    shards: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)


def with_ending(prefix: str | Path, ending: str) -> Path:
    """PREFIX and an ending; a dot in the name of the prefix stays."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ending)


def manifest_path(prefix: str | Path) -> Path:
    """Where the manifest of a token file lies."""
    return with_ending(prefix, ".json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """What is known of a token file; None for one that another program made.

    Raises:
        DataError: it is damaged.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**content)
        for item in fields(Manifest):
            value = getattr(manifest, item.name)
            kind = dict if get_origin(item.type) is dict else list if get_origin(item.type) is list else item.type
            if isinstance(value, bool) or not isinstance(value, kind):  # type: ignore[arg-type]
                raise TypeError
        if not all(isinstance(name, str) and name == Path(name).name and name for name in manifest.shards):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise DataError(Problem(str(path), None, "is damaged; prepare the data again.")) from None
    return manifest


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Writes it beside its token file, whole or not at all."""
    atomic_write_json(manifest_path(prefix), asdict(manifest), durable=True)


def file_digest(path: Path) -> str:
    """xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()
