"""Creates tokenizers: trained on text, or converted from a tiktoken rank file."""

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qwen.data.tokenizers.content import QWEN2_SPLIT
from megatron_qwen.data.tokenizers.end_token import END_OF_TEXT
from megatron_qwen.data.tokenizers.tokenizer import CONTROL_TOKENS
from megatron_qwen.errors import DataError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

# Qwen2.5's control tokens in the order of their ids, 151643 to 151664 (its tokenizer_config.json). The first are
# special: a decoder may leave them out. Tools, fill-in-the-middle and repositories are text to it.
QWEN2_5_CONTROL_TOKENS = (
    *CONTROL_TOKENS,
    *(f"<|{name}|>" for name in ("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start")),
    *(f"<|{name}|>" for name in ("quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")),
    "<tool_call>",
    "</tool_call>",
    *(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
)
_SPECIAL = 14  # up to <|video_pad|>


def train_bpe(texts: Iterable[str], directory: Path, *, vocab_size: int) -> None:
    """Trains a byte-level BPE with Qwen2's pre-tokenizer and control tokens.

    Args:
        texts: training text.
        directory: where tokenizer.json and tokenizer_config.json go.
        vocab_size: ids in all, control tokens included.
    """
    from tokenizers import models, pre_tokenizers, trainers

    library = _byte_level(models.BPE())
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


def import_tiktoken(ranks: Path, directory: Path) -> None:
    """Converts a tiktoken rank file, such as Qwen's own, into a Hugging Face tokenizer with Qwen2.5's control tokens.

    Args:
        ranks: each line has a token in base64 and its rank; ranks count from 0 without gaps.
        directory: where tokenizer.json, vocab.json, merges.txt and tokenizer_config.json go.

    Raises:
        DataError: the file is not a rank file.
    """
    from gigatoken import Tokenizer as Gigatoken
    from tokenizers import AddedToken, models

    tokens = _read_ranks(ranks)
    try:
        merges = Gigatoken.from_tiktoken(ranks, "qwen2").merges
    except Exception as error:
        raise DataError(Problem(str(ranks), None, f"is not a rank file of a byte-level BPE ({error}).")) from None
    letters = _byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {written(token): rank for rank, token in enumerate(tokens)}
    pairs = [(written(left), written(right)) for left, right in merges]
    library = _byte_level(models.BPE(vocabulary, pairs))
    for index, name in enumerate(QWEN2_5_CONTROL_TOKENS):
        library.add_tokens([AddedToken(name, normalized=False, special=index < _SPECIAL)])
    directory.mkdir(parents=True, exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in pairs)
    (directory / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    added = {
        str(len(tokens) + index): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": index < _SPECIAL,
        }
        for index, name in enumerate(QWEN2_5_CONTROL_TOKENS)
    }
    _write_config(
        directory,
        "Qwen2Tokenizer",
        added_tokens_decoder=added,
        additional_special_tokens=list(QWEN2_5_CONTROL_TOKENS[1:_SPECIAL]),
    )


def _read_ranks(path: Path) -> list[bytes]:
    """Tokens in the order of their ranks."""
    tokens: list[bytes] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                token, _, rank = line.strip().partition(b" ")
                if not line.strip():
                    continue
                tokens.append(base64.b64decode(token, validate=True))
                if not rank.isdigit() or int(rank) != len(tokens) - 1:
                    fix = f"does not have rank {len(tokens) - 1}; ranks must count from 0 without gaps."
                    raise DataError(Problem(f"{path}:{number}", line[:60].decode(errors="replace").strip(), fix))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        fix = "is not a token in base64 and its rank; this is not a tiktoken rank file."
        raise DataError(Problem(f"{path}:{len(tokens) + 1}", None, fix)) from None
    except OSError as error:
        raise DataError(Problem(str(path), None, f"cannot be read ({error.strerror}).")) from None
    if missing := {bytes([byte]) for byte in range(256)}.difference(tokens):
        raise DataError(
            Problem(str(path), None, f"lacks {len(missing)} of the 256 single bytes, so it is not byte-level.")
        )
    return tokens


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_level(model: Any) -> "Library":
    """A tokenizer with Qwen2's normaliser, pre-tokenizer and decoder around a BPE."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(model)
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


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
        raise DataError(Problem("text", None, "the input has no text to train a tokenizer on."))


def _write_config(directory: Path, tokenizer_class: str, **more: Any) -> None:
    content: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None if tokenizer_class != "LlamaTokenizer" else "<unk>",
        "additional_special_tokens": list(CONTROL_TOKENS[1:]) if tokenizer_class != "LlamaTokenizer" else [],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        **more,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
