"""Tokenizer directories: byte-level BPE in Hugging Face form, or a SentencePiece model."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_qwen.errors import DataError, Problem

END_OF_TEXT = "<|endoftext|>"
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
        """Ids of the control tokens, by name."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without any added token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


class BpeTokenizer:
    """A tokenizer.json, through the tokenizers library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(str(path))
        except Exception as error:
            raise DataError(Problem(str(path), None, f"is not a tokenizer ({error}).")) from None
        size = int(self._library.get_vocab_size(with_added_tokens=True))
        dense = self._library.id_to_token(size - 1) is not None and self._library.id_to_token(size) is None
        end: int | None = self._library.token_to_id(END_OF_TEXT)
        if end is None:
            raise DataError(
                Problem(str(path), None, f"has no {END_OF_TEXT} token, which marks the end of a document; add it.")
            )
        self.vocab_size = size if dense else max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text = end
        added = self._library.get_added_tokens_decoder()
        self.control_tokens = {token.content: index for index, token in sorted(added.items())}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, on all cores."""
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        text: str = self._library.decode(list(ids))
        return text


class SentencePieceTokenizer:
    """A SentencePiece model; its end-of-sentence piece ends documents."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._library = SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise DataError(Problem(str(path), None, f"is not a SentencePiece model ({error}).")) from None
        self.vocab_size = int(self._library.vocab_size())
        self.end_of_text = int(self._library.eos_id())
        self.control_tokens = {END_OF_TEXT: self.end_of_text}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts."""
        ids: list[list[int]] = self._library.encode(list(texts))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        text: str = self._library.decode(list(ids))
        return text


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a directory.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    path = _deciding_file(Path(directory))
    return BpeTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _deciding_file(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    fix = "holds neither tokenizer.json nor tokenizer.model; `mq data tokenizer train` makes one."
    raise DataError(Problem(str(directory), None, fix))


def tokenizers_without_threads() -> None:
    """For a forked process: it lacks the threads that its parent may have started, and would wait for them forever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def fingerprint(directory: str | Path) -> str:
    """SHA-256 of the file that determines the ids."""
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
    """Copies the files of a tokenizer, byte for byte, and returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
