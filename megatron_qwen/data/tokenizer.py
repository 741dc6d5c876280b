"""Tokenizer directories: byte-level BPE in Hugging Face form, or a SentencePiece model."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
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
    "generation_config.json",  # which tokens end a text belongs with the tokens
)
# Qwen2's pre-tokenizer: words with their leading space, digits one by one, runs of punctuation, line ends.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer(Protocol):
    """What the preparation of data needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_text(self) -> int:
        """Id that ends a document."""

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
            raise DataError(Problem(str(path), None, f"is no tokenizer ({error}).")) from None
        vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        if END_OF_TEXT not in vocabulary:
            raise DataError(Problem(str(path), None, f"has no {END_OF_TEXT} token to end documents with."))
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary[END_OF_TEXT]

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
            raise DataError(Problem(str(path), None, f"is no SentencePiece model ({error}).")) from None
        self.vocab_size = int(self._library.vocab_size())
        self.end_of_text = int(self._library.eos_id())

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
        DataError: there is none, or it cannot be used.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return BpeTokenizer(directory / "tokenizer.json")
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory / "tokenizer.model")
    raise DataError(
        Problem(
            str(directory),
            None,
            "holds neither tokenizer.json nor tokenizer.model; `mq data tokenizer train` makes one.",
        )
    )


def fingerprint(directory: str | Path) -> str:
    """SHA-256 of the file that decides the ids."""
    directory = Path(directory)
    load_tokenizer(directory)
    name = "tokenizer.json" if (directory / "tokenizer.json").is_file() else "tokenizer.model"
    return hashlib.sha256((directory / name).read_bytes()).hexdigest()


def special_ids(directory: Path) -> tuple[int | list[int], int | None]:
    """(eos, bos) for config.json.

    A generation_config.json that came with the tokenizer decides; else documents end with the end-of-text token, and
    the family begins one with the same.
    """
    try:
        noted = json.loads((directory / "generation_config.json").read_text())
    except FileNotFoundError:
        noted = {}
    except (OSError, ValueError):
        raise DataError(Problem(str(directory / "generation_config.json"), None, "is no JSON; mend it.")) from None
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


def train_bpe(texts: Iterable[str], directory: Path, *, vocab_size: int) -> None:
    """Trains a byte-level BPE with Qwen2's pre-tokenizer and control tokens.

    Args:
        texts: training text.
        directory: where tokenizer.json and tokenizer_config.json go.
        vocab_size: ids in all, control tokens included.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    # Ordinary tokens first and control tokens last, as in Qwen's vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_not_empty(texts), trainer)
    library.add_special_tokens(list(CONTROL_TOKENS))
    directory.mkdir(parents=True, exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    _write_config(directory, "PreTrainedTokenizerFast")


def train_sentencepiece(texts: Iterable[str], directory: Path, *, vocab_size: int) -> None:
    """Trains a SentencePiece BPE model with byte fall-back.

    Args:
        texts: training text.
        directory: where tokenizer.model and tokenizer_config.json go.
        vocab_size: pieces in all.
    """
    from sentencepiece import SentencePieceTrainer

    directory.mkdir(parents=True, exist_ok=True)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(_not_empty(line for text in texts for line in text.splitlines() if line)),
            model_prefix=str(directory / "tokenizer"),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            bos_id=-1,
            pad_id=-1,
            eos_id=1,
            unk_id=0,
            eos_piece=END_OF_TEXT,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            Problem("--vocab-size", vocab_size, f"SentencePiece refused: {str(error).splitlines()[-1]}")
        ) from None
    (directory / "tokenizer.vocab").unlink(missing_ok=True)
    _write_config(directory, "LlamaTokenizer")


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise DataError(Problem("text", None, "there is no text to train a tokenizer on."))


def _write_config(directory: Path, tokenizer_class: str) -> None:
    content: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None if tokenizer_class != "LlamaTokenizer" else "<unk>",
        "additional_special_tokens": list(CONTROL_TOKENS[1:]) if tokenizer_class != "LlamaTokenizer" else [],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
