"""The record of an encoded unit: what is in its files, which another attempt finds and reuses."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class Part:
    """An encoded unit.

    Args:
        key: of the unit.
        documents: documents written; the other counts are those of the manifest.
        bin_xxh3_128: hash of its tokens.
        len_xxh3_128: hash of the lengths of its documents.
        mask_xxh3_128: hash of its loss mask; empty without one.
        mask: whether the preparation writes a loss mask (documents with prompts).
        spelled: how often documents spell a control token, by its id.
        samples: some texts and their ids, for comparison with the tokenizer.
        trained: tokens of conversations that carry loss.
        answers: of the assistant that carry loss.
        longest: tokens of the longest conversation.
        reasons: how many conversations are left out, by the reason.
        chats: some conversations, their ids and masks, for comparison.
    """

    key: str
    documents: int = 0
    tokens: int = 0
    read: int = 0
    empty: int = 0
    filtered: int = 0
    skipped: int = 0
    text_bytes: int = 0
    bin_xxh3_128: str = ""
    len_xxh3_128: str = ""
    mask_xxh3_128: str = ""
    mask: bool = False
    spelled: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[str, list[int]]] = field(default_factory=list)
    trained: int = 0
    answers: int = 0
    longest: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    chats: list[dict[str, Any]] = field(default_factory=list)


COUNTS = ("documents", "tokens", "read", "empty", "filtered", "skipped", "text_bytes")


def part_path(work: Path, key: str, ending: str) -> Path:
    """A file of a part."""
    return work / f"{key}.{ending}"


def read_part(work: Path, key: str) -> Part | None:
    """A part that an earlier attempt finished; None if there is none."""
    try:
        content: dict[str, Any] = json.loads(part_path(work, key, "json").read_text())
        part = Part(**content)
        part.samples = [(text, ids) for text, ids in part.samples]
        sizes = [part_path(work, key, ending).stat().st_size for ending in ("bin", "len")]
    except (OSError, ValueError, TypeError):
        return None
    if set(content) != {item.name for item in fields(Part)} or sizes[1] != 4 * part.documents:
        return None
    return part
