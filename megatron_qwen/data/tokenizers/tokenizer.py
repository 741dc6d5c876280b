"""Tokenizer directories: byte-level BPE in Hugging Face form, or a SentencePiece model."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megatron_qwen.data.tokenizers.end_token import END_OF_TEXT, EndToken, end_token
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
_CONTROL, _USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type of sentencepiece_model.proto


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
        """Id that ends a document. Raises DataError if there is none: only who ends documents needs it."""

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

    def written_out(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens by their names."""


class BpeTokenizer:
    """A tokenizer.json, through the tokenizers library.

    Args:
        path: the file.
        end: token that ends a document; None takes the tokenizer's own.

    Attributes:
        written: control tokens that the file does not call special: a model writes them, as it writes text.
        strips: whether any added token takes spaces beside it along.
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
        self._path, self._end = path, end
        added = self._library.get_added_tokens_decoder()
        self.control_tokens = {token.content: index for index, token in sorted(added.items())}
        self.spellable = self._content.control
        self.written = frozenset(
            token["content"]
            for token in self._content.added
            if not token.get("special") and token["content"] in self.spellable
        )
        self.strips = any(token.get("lstrip") or token.get("rstrip") for token in self._content.added)
        self._plain: Any = None

    @cached_property
    def end_of_text(self) -> int:
        """Id that ends a document."""
        return end_token(self._path.parent, self._library.token_to_id, asked=self._end).id

    def encode_batch(self, texts: Sequence[str], *, control_as_text: bool = False) -> list[list[int]]:
        """Ids of texts, on all cores."""
        library = self._without_control() if control_as_text else self._library
        return [encoding.ids for encoding in library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, text: str, *, control_as_text: bool = False) -> list[tuple[int, int]]:
        """Characters [a, b) of a text that each of its tokens stands for."""
        library = self._without_control() if control_as_text else self._library
        found: list[tuple[int, int]] = library.encode(text, add_special_tokens=False).offsets
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        text: str = self._library.decode(list(ids))
        return text

    def written_out(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens by their names."""
        text: str = self._library.decode(list(ids), skip_special_tokens=False)
        return text

    def _without_control(self) -> Any:
        if self._plain is None:
            self._plain = type(self._library).from_buffer(self._content.for_documents(control=False))
        return self._plain


class SentencePieceTokenizer:
    """A SentencePiece model.

    Args:
        path: the model.
        end: token that ends a document; None takes the tokenizer's own, or else the model's end-of-sentence piece.

    Attributes:
        never_taken: pieces that name control and that the model takes from no text.

    Raises:
        DataError: it is no model.
    """

    def __init__(self, path: Path, end: str | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        from megatron_qwen.data.tokenizers.content import names_control

        self._path, self._end = path, end
        try:
            self._library = SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise DataError(Problem(str(path), None, f"is not a SentencePiece model ({error}).")) from None
        self.vocab_size = int(self._library.vocab_size())
        pieces = self._library.id_to_piece(list(range(self.vocab_size)))
        named = [index for index, piece in enumerate(pieces) if names_control(piece)]
        # A model takes user-defined pieces from a text, and none of control.
        taken = {index for index in named if not self._library.is_control(index)}
        self.never_taken = [] if taken else [pieces[index] for index in named]
        self.spellable: dict[str, int] = {}
        self._plain = self._library
        if taken:
            control = [index for index in range(self.vocab_size) if index in taken or self._library.is_control(index)]
            self.spellable = {pieces[index]: index for index in control}
            # All of them or none, as transformers does.
            self._library, self._plain = (self._with_control_as(kind) for kind in (_USER_DEFINED, _CONTROL))

    @cached_property
    def end_of_text(self) -> int:
        """Id that ends a document."""
        return self.ends.id

    @property
    def ends(self) -> EndToken:
        """The piece that ends a document."""
        eos = int(self._plain.eos_id())  # the other has it as a piece of text
        own = END_OF_TEXT if eos < 0 else str(self._library.id_to_piece(eos))
        return end_token(self._path.parent, self._id_of, asked=self._end, own=own)

    @property
    def control_tokens(self) -> dict[str, int]:
        """Id of the piece that ends a document."""
        return {str(self._library.id_to_piece(self.end_of_text)): self.end_of_text}

    def pieces(self) -> list[tuple[int, str]]:
        """Ids and pieces that stand for text."""
        plain = self._plain
        return [
            (index, str(plain.id_to_piece(index)))
            for index in range(self.vocab_size)
            if not (plain.is_control(index) or plain.is_unknown(index) or plain.is_unused(index))
        ]

    def encode_batch(self, texts: Sequence[str], *, control_as_text: bool = False) -> list[list[int]]:
        """Ids of texts."""
        ids: list[list[int]] = (self._plain if control_as_text else self._library).encode(list(texts))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        text: str = self._library.decode(list(ids))
        return text

    def written_out(self, ids: Sequence[int]) -> str:
        """Text of ids; pieces of control have none here."""
        return self.decode(ids)

    def _id_of(self, piece: str) -> int | None:
        found = int(self._library.piece_to_id(piece))
        return found if found >= 0 and self._library.id_to_piece(found) == piece else None

    def _with_control_as(self, kind: int) -> Any:
        """The model, with the pieces that name control as pieces of a kind."""
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(self._path.read_bytes())
        for index in self.spellable.values():
            model.pieces[index].type = kind
        return SentencePieceProcessor(model_proto=model.SerializeToString())


def load_tokenizer(directory: str | Path, *, end: str | None = None) -> Tokenizer:
    """The tokenizer in a directory.

    Args:
        directory: of the tokenizer.
        end: token that ends a document; None takes the tokenizer's own.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    path = deciding_file(Path(directory))
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
        DataError: there is none, or not the token that is to end a document, or control tokens cannot be treated as
            asked.
    """
    path = deciding_file(directory)
    if path.suffix != ".json":
        decides, switched_off = file_sha256(directory), list[str]()
        model = SentencePieceTokenizer(path, options.end_token)
        ends = model.ends
        if model.never_taken and not options.control_as_text:
            piece = model.never_taken[0]
            fix = f"is not possible: this SentencePiece model takes its pieces of control ({piece}) from no text."
            raise DataError(Problem("--control-tokens", "encode", fix))
    else:
        from megatron_qwen.data.tokenizers.content import TokenizerContent

        content = TokenizerContent(path)
        decides, switched_off = content.function_sha256(), content.switched_off()
        ends = end_token(directory, content.id_of, asked=options.end_token)
    notes = [f"{one} is switched off: documents are encoded whole, and always alike" for one in switched_off]
    if ends.passed_over is not None:
        notes.append(
            f"documents end with {ends.name}, not with {ends.passed_over}, which ends a turn of a conversation; "
            "--end-token names another"
        )
    return DocumentEncoding(decides, ends.id, notes)


def deciding_file(directory: Path) -> Path:
    """The file of a tokenizer directory that decides the ids. Raises DataError if there is none."""
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
    path = deciding_file(Path(directory))
    if path.suffix != ".json":
        return file_sha256(directory)
    from megatron_qwen.data.tokenizers.content import TokenizerContent

    return TokenizerContent(path).function_sha256()


def file_sha256(directory: str | Path) -> str:
    """SHA-256 of the file that decides the ids, by which older manifests know a tokenizer."""
    import hashlib  # with OpenSSL it takes 9 ms, and the command line of `mq train` imports this module

    return hashlib.sha256(deciding_file(Path(directory)).read_bytes()).hexdigest()


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
