"""Tokenizer directories: byte-level BPE in Hugging Face form, or a SentencePiece model."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron_qwen.data.tokenizers.end_token import END_OF_TEXT, end_token
from megatron_qwen.errors import DataError, Problem

CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",  # it names the tokens that end a text
)
# Beside a tokenizer that came with a model: what the model's config.json said, for the export of what is made of it.
SOURCE_CONFIG = "source_config.json"


@dataclass(frozen=True)
class DocumentOptions:
    """How documents become ids.

    Args:
        end_token: that ends a document; None takes the tokenizer's own (``end_token.py``).
        control_as_text: what a document says is text, even where it spells a control token; off, it becomes the token.
    """

    end_token: str | None = None
    control_as_text: bool = True


class Tokenizer(Protocol):
    """What the preparation of data needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_text(self) -> int:
        """Id that ends a document."""

    @property
    def control_tokens(self) -> dict[str, int]:
        """Ids of the added tokens, by name."""

    @property
    def spellable(self) -> dict[str, int]:
        """Of these, the control tokens that a text can spell."""

    def encode_batch(self, texts: Sequence[str], *, control_as_text: bool = False) -> list[list[int]]:
        """Ids of texts, without any added token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


class BpeTokenizer:
    """A tokenizer.json, through the tokenizers library.

    Args:
        path: the file.
        end: token that ends a document; None takes the tokenizer's own.
    """

    def __init__(self, path: Path, end: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        from megatron_qwen.data.tokenizers.content import TokenizerContent

        self._content = TokenizerContent(path)
        try:
            self._library = Library.from_buffer(self._content.for_documents(control=True))
        except Exception as error:
            raise DataError(Problem(str(path), None, f"is not a tokenizer ({error}).")) from None
        size = int(self._library.get_vocab_size(with_added_tokens=True))
        dense = self._library.id_to_token(size - 1) is not None and self._library.id_to_token(size) is None
        self.vocab_size = size if dense else max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text = end_token(path.parent, self._library.token_to_id, asked=end).id
        added = self._library.get_added_tokens_decoder()
        self.control_tokens = {token.content: index for index, token in sorted(added.items())}
        self.spellable = self._content.control
        self._plain: Any = None

    def encode_batch(self, texts: Sequence[str], *, control_as_text: bool = False) -> list[list[int]]:
        """Ids of texts, on all cores."""
        library = self._without_control() if control_as_text else self._library
        return [encoding.ids for encoding in library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        text: str = self._library.decode(list(ids))
        return text

    def _without_control(self) -> Any:
        if self._plain is None:
            self._plain = type(self._library).from_buffer(self._content.for_documents(control=False))
        return self._plain


class SentencePieceTokenizer:
    """A SentencePiece model; its end-of-sentence piece ends documents.

    Args:
        path: the model.
        end: token that ends a document; None takes the model's own.

    Raises:
        DataError: it is no model, or has no such piece.
    """

    spellable: ClassVar[dict[str, int]] = {}  # a model takes no piece of control from a text

    def __init__(self, path: Path, end: str | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._library = SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise DataError(Problem(str(path), None, f"is not a SentencePiece model ({error}).")) from None
        self.vocab_size = int(self._library.vocab_size())
        self.end_of_text = int(self._library.eos_id()) if end is None else int(self._library.piece_to_id(end))
        if self.end_of_text < 0 or (end is not None and self._library.id_to_piece(self.end_of_text) != end):
            what = "end-of-sentence piece" if end is None else f"piece {end}"
            fix = f"has no {what}, which would mark the end of a document; name one with --end-token."
            raise DataError(Problem(str(path), None, fix))
        self.control_tokens = {str(self._library.id_to_piece(self.end_of_text)): self.end_of_text}

    def encode_batch(self, texts: Sequence[str], *, control_as_text: bool = False) -> list[list[int]]:
        """Ids of texts, which are text in any case."""
        ids: list[list[int]] = self._library.encode(list(texts))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        text: str = self._library.decode(list(ids))
        return text


def load_tokenizer(directory: str | Path, *, end: str | None = None) -> Tokenizer:
    """The tokenizer in a directory.

    Args:
        directory: of the tokenizer.
        end: token that ends a document; None takes the tokenizer's own.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    path = _deciding_file(Path(directory))
    return BpeTokenizer(path, end) if path.suffix == ".json" else SentencePieceTokenizer(path, end)


@dataclass(frozen=True)
class DocumentEncoding:
    """How a tokenizer encodes documents.

    Args:
        fingerprint: of what decides the ids.
        end: id that ends a document.
        notes: what of the tokenizer's files is not used on documents, or may be meant otherwise; for people.
    """

    fingerprint: str
    end: int
    notes: list[str]


def document_encoding(directory: Path, options: DocumentOptions) -> DocumentEncoding:
    """How the tokenizer in a directory encodes documents, without loading it.

    Raises:
        DataError: there is none, or not the token that is to end a document.
    """
    path = _deciding_file(directory)
    if path.suffix != ".json":
        end = SentencePieceTokenizer(path, options.end_token).end_of_text
        return DocumentEncoding(file_sha256(directory), end, [])
    from megatron_qwen.data.tokenizers.content import TokenizerContent

    content = TokenizerContent(path)
    ends = end_token(directory, content.id_of, asked=options.end_token)
    notes = [f"{one} is switched off: documents are encoded whole, and always alike" for one in content.switched_off()]
    if ends.passed_over is not None:
        notes.append(
            f"documents end with {ends.name}, not with {ends.passed_over}, which ends a turn of a conversation; "
            "--end-token names another"
        )
    return DocumentEncoding(content.function_sha256(), ends.id, notes)


def _deciding_file(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    fix = "holds neither tokenizer.json nor tokenizer.model; `mq data tokenizer train` makes one."
    if (directory / "vocab.json").is_file():
        fix = "holds vocab.json and no tokenizer.json; transformers' AutoTokenizer makes one with save_pretrained."
    raise DataError(Problem(str(directory), None, fix))


def tokenizers_without_threads() -> None:
    """For a forked process: it lacks the threads that its parent may have started, and would wait for them forever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def fingerprint(directory: str | Path) -> str:
    """SHA-256 of what decides the ids: of a tokenizer.json its function, whatever the file's layout; of a SentencePiece
    model the file.
    """
    path = _deciding_file(Path(directory))
    if path.suffix != ".json":
        return file_sha256(directory)
    from megatron_qwen.data.tokenizers.content import TokenizerContent

    return TokenizerContent(path).function_sha256()


def file_sha256(directory: str | Path) -> str:
    """SHA-256 of the file that decides the ids, by which older manifests know a tokenizer."""
    import hashlib  # with OpenSSL it takes 9 ms, and the command line of `mq train` imports this module

    return hashlib.sha256(_deciding_file(Path(directory)).read_bytes()).hexdigest()


def special_ids(directory: Path) -> tuple[int | list[int], int | None]:
    """(eos, bos) for config.json.

    Taken from generation_config.json if the tokenizer came with one. Otherwise both are the end-of-text token, as in
    the base models of the family.
    """
    try:
        noted = json.loads((directory / "generation_config.json").read_text())
    except FileNotFoundError:
        noted = {}
    except (OSError, ValueError):
        raise DataError(
            Problem(str(directory / "generation_config.json"), None, "is not valid JSON; fix it.")
        ) from None
    if not isinstance(noted, dict) or not _are_ids(noted.get("eos_token_id")):
        end = load_tokenizer(directory).end_of_text
        return end, end
    return noted["eos_token_id"], noted.get("bos_token_id")


def _are_ids(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, list) and all(isinstance(item, int) for item in value))


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies the files of a tokenizer, byte for byte, and returns their names.

    Of a model's directory its config.json goes along as source_config.json.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    came_with = next((source / name for name in (SOURCE_CONFIG, "config.json") if (source / name).is_file()), None)
    if came_with is not None:
        shutil.copyfile(came_with, target / SOURCE_CONFIG)
    return names
