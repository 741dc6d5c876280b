"""Blocks of documents: how a record becomes a document, and what is wrong with one that does not.

Every file format is read into these blocks (``records.py`` and ``parquet.py``).
"""

from dataclasses import dataclass, field
from typing import Any

from megatron_qwen.data.text.filters import Condition, lookup
from megatron_qwen.data.text.long import LongText
from megatron_qwen.errors import Problem


@dataclass(frozen=True)
class ReadOptions:
    """How documents are taken from records.

    Args:
        field: JSON field or parquet column of the text.
        prompt_field: field of a prompt, which precedes the text and carries no loss; None: no prompts.
        where: conditions a record must meet.
        separator: string that divides a .txt file into documents; None: the file is one document.
        max_document_bytes: a longer document is a bad record.
    """

    field: str = "text"
    prompt_field: str | None = None
    where: tuple[Condition, ...] = ()
    separator: str | None = None
    max_document_bytes: int = 512 << 20


@dataclass(frozen=True)
class BadRecord:
    """A record that is not a document: its place, its beginning, what is wrong with it, and its first bytes."""

    where: str
    snippet: str | None
    fix: str
    raw: bytes = b""

    def problem(self) -> Problem:
        """As the problem of an error."""
        return Problem(self.where, self.snippet, self.fix)


_MISSING = object()

# A text, a pair of prompt and text, or a text that is too long for one string.
Document = str | tuple[str, str] | LongText


def as_text(document: Document) -> str:
    """A document as one string."""
    if isinstance(document, LongText):
        return document.text()
    return document if isinstance(document, str) else "".join(document)


@dataclass
class Block:
    """Some records of a span; read = documents + empty + filtered + bad.

    Args:
        texts: the documents.
        read: records.
        empty: records without text.
        filtered: records that a condition excludes.
        bad: records that are not documents.
        bytes: UTF-8 bytes of the records.
    """

    texts: list[Document] = field(default_factory=list)
    read: int = 0
    empty: int = 0
    filtered: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    bytes: int = 0


def take(block: Block, record: dict[str, Any], text: Any, options: ReadOptions) -> str | None:
    """Adds a record's document to a block, or returns what is wrong with the record."""
    if text is None and lookup(record, options.field, _MISSING) is None:
        text = ""  # null is how a data set says that there is none
    if type(text) is not str and not isinstance(text, LongText):
        return f"has no text in the field {options.field!r}; see --field."
    prompt = None
    if options.prompt_field is not None:
        prompt = lookup(record, options.prompt_field)
        if type(prompt) is not str:
            return f"has no text in the field {options.prompt_field!r}; see --prompt-field."
    if not all(condition.holds(record) for condition in options.where):
        block.filtered += 1
    elif not text:
        block.empty += 1
    else:
        block.texts.append(text if prompt is None else (prompt, as_text(text)))
    return None
