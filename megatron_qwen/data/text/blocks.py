"""Records as documents: how they are taken, a block of them, and what is wrong with those that are none.

Every form of file is read into these blocks (``records.py`` and ``parquet.py``).
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
        prompt_field: field of text that goes before it and carries no loss; None is none.
        where: conditions a record must meet.
        separator: what divides a .txt file into documents; None takes it whole.
        max_document_bytes: a longer document is a bad one.
    """

    field: str = "text"
    prompt_field: str | None = None
    where: tuple[Condition, ...] = ()
    separator: str | None = None
    max_document_bytes: int = 512 << 20


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document: where, how it begins, what is wrong with it, and its first bytes."""

    where: str
    snippet: str | None
    fix: str
    raw: bytes = b""

    def problem(self) -> Problem:
        """As the problem of an error."""
        return Problem(self.where, self.snippet, self.fix)


# A text, a prompt and its text, or a text that is too long for one string.
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
        texts: documents, a prompt and its text as a pair.
        read: records.
        empty: records without text.
        filtered: records that a condition leaves out.
        bad: records that are no documents.
        bytes: UTF-8 bytes of the records.
    """

    texts: list[Document] = field(default_factory=list)
    read: int = 0
    empty: int = 0
    filtered: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    bytes: int = 0


def take(block: Block, record: dict[str, Any], text: Any, options: ReadOptions) -> str | None:
    """Puts a record's document into a block, or says what is wrong with it."""
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
