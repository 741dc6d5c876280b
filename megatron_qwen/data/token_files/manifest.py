"""PREFIX.json next to a token file: its content, the text it was made from, and its checksums."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import xxhash

from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import atomic_write_json

_COPY_BYTES = 1 << 24


# Key in ``Manifest.chat``: the value of a loss mask where a token counts whole, if that is not 1.
LOSS_UNIT = "loss_unit"
# A byte of a .mask: the weight of a token's loss, and a bit where a further sequence of the same document begins.
LOSS_BITS, MEMBER = 0x7F, 0x80
# Key in ``Manifest.chat``: sequences of each document, if not one; 2 for pairs of answers.
MEMBERS = "members"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a token file, or of a set of token files (shards).

    Every record is counted once:
    read = documents + empty + filtered + skipped.

    Args:
        documents: documents written.
        tokens: tokens written, end-of-document tokens included.
        read: records read.
        empty: records without text.
        filtered: records that a condition (``--where``) excluded.
        skipped: bad records (``--on-error skip``); they are in PREFIX.skipped.jsonl.
        text_bytes: UTF-8 bytes of the records.
        vocab_size: one more than the largest id of the tokenizer.
        end_of_text: id after every document.
        control_tokens: ids of the added tokens by name.
        control_tokens_in_text: ``text`` or ``tokens``: what became of control tokens that documents spell; of merged
            files that differ in it ``text and tokens``.
        spelled_control_tokens: how often documents spell them, by name.
        tokenizer_sha256: of what decides the ids; in older manifests of the tokenizer's file.
        encoder: library that made the ids.
        bin_xxh3_128: of the .bin; of a set, over those of its shards.
        idx_xxh3_128: of the .idx; None for a set.
        mask_xxh3_128: of the .mask (one byte per token: whether it carries loss); None without a mask.
        shards: names of a set's token files, without ending, in the directory of the manifest.
        options: how records were read.
        inputs: path and size of every input file.
        left_out: path of everything else that lay among the input, and why it was not read; of a set, not of its
            shards.
        chat: of conversations: the template that rendered them, its control tokens of turns, tokens with loss, answers
            with loss, tokens of the longest, and how many records were left out for which reason; else empty.
        made_by: hash of everything that determines the output, by which the same command recognises its own output.
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
    control_tokens_in_text: str = "tokens"  # as in manifests that do not say it
    spelled_control_tokens: dict[str, int] = field(default_factory=dict)
    idx_xxh3_128: str | None = None
    mask_xxh3_128: str | None = None
    shards: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    chat: dict[str, Any] = field(default_factory=dict)


def with_ending(prefix: str | Path, ending: str) -> Path:
    """PREFIX plus an ending; unlike ``Path.with_suffix`` it keeps a dot in the name."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ending)


def manifest_path(prefix: str | Path) -> Path:
    """Path of the manifest of a token file."""
    return with_ending(prefix, ".json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a token file; None if there is none, as for a file that another program made.

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


def chats_together(chats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``Manifest.chat`` of several token files; of files with other templates what they have in common."""
    there = [chat for chat in chats if chat]
    if not there:
        return {}
    found = {name: value for name, value in there[0].items() if all(one.get(name) == value for one in there)}
    for name in ("trained_tokens", "answers"):
        found[name] = sum(chat.get(name, 0) for chat in there)
    found["longest"] = max(chat.get("longest", 0) for chat in there)
    reasons = sum((Counter(chat.get("reasons", {})) for chat in there), Counter[str]())
    return {**found, "reasons": dict(sorted(reasons.items()))}


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Writes the manifest next to its token file, atomically."""
    atomic_write_json(manifest_path(prefix), asdict(manifest), durable=True)


def file_digest(path: Path) -> str:
    """xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()
