"""Blocks of documents: how a record becomes a document, and what is wrong with one that does not.

Every file format is read into these blocks (``records.py`` and ``parquet.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_qwen.data.chat.conversation import Conversation, Rejected
from megatron_qwen.data.chat.forms import conversation_of
from megatron_qwen.data.chat.pairs import pair_of
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
        chat: whether records are conversations (``data/chat``); then no field is looked for.
        pairs: whether they are pairs of conversations.
    """

    field: str = "text"
    prompt_field: str | None = None
    where: tuple[Condition, ...] = ()
    separator: str | None = None
    max_document_bytes: int = 512 << 20
    chat: bool = False
    pairs: bool = False


@dataclass(frozen=True)
class BadRecord:
    """A record that is not a document.

    Args:
        where: its place.
        snippet: its beginning.
        fix: what is wrong with it.
        raw: its first bytes.
        reason: the kind of mistake, where they are counted.
    """

    where: str
    snippet: str | None
    fix: str
    raw: bytes = b""
    reason: str = ""

    def problem(self) -> Problem:
        """As the problem of an error."""
        return Problem(self.where, self.snippet, self.fix)


_MISSING = object()


@dataclass(frozen=True, slots=True)
class ChatDocument:
    """A conversation, with its place in the input: whether its template can render it is seen later.

    Args:
        conversation: the messages; of a pair the chosen one.
        other: of a pair the rejected one.
        bad: called with what is wrong with it and the kind of mistake, makes a bad record of it.
    """

    conversation: Conversation
    bad: Callable[[str, str], BadRecord]
    other: Conversation | None = None


# A text, a pair of prompt and text, a text that is too long for one string, or a conversation.
Document = str | tuple[str, str] | LongText | ChatDocument


def as_text(document: Document) -> str:
    """A document as one string."""
    if isinstance(document, ChatDocument):
        return "\n".join(str(message["content"]) for message in document.conversation.messages)
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


def take_chat(block: Block, record: Any, options: ReadOptions, bad: Callable[[str, str], BadRecord]) -> None:
    """Adds a record's conversation to a block, or a bad record."""
    found = pair_of(record) if options.pairs else conversation_of(record)
    if isinstance(found, Rejected):
        block.bad.append(bad(found.fix, found.reason))
    elif not all(condition.holds(record) for condition in options.where):
        block.filtered += 1
    else:
        first, other = found if isinstance(found, tuple) else (found, None)
        block.texts.append(ChatDocument(first, bad, other))


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
