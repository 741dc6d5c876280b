"""How many bytes of text each token stands for, so that losses with different tokenizers can be compared."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_qwen.data.tokenizers.content import TokenizerContent
from megatron_qwen.data.tokenizers.tokenizer import SentencePieceTokenizer, load_tokenizer

_SPACE = "\u2581"  # how pieces that are not byte-level write a space
Counts = np.ndarray[Any, np.dtype[np.int64]]


def token_bytes(directory: Path) -> Counts | None:
    """UTF-8 bytes by id, [vocabulary]; control tokens and ids that no token has are 0.

    Their sum over the ids of a text is the length of the text, where the tokenizer normalises nothing. SentencePiece
    models that put a space in front of every document have one more. None where tokens do not say what they stand for
    (WordPiece has no spaces).

    Raises:
        DataError: the directory has no tokenizer.
    """
    tokenizer = load_tokenizer(directory)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    if isinstance(tokenizer, SentencePieceTokenizer):
        for index, piece in tokenizer.pieces():
            counts[index] = _length(piece)
        return counts
    content = TokenizerContent(directory / "tokenizer.json")
    if content.model.get("type") not in {"BPE", "Unigram", None}:
        return None
    vocabulary = content.model["vocab"]  # of a Unigram model a list of pieces and scores
    named = vocabulary.items() if isinstance(vocabulary, dict) else ((one[0], at) for at, one in enumerate(vocabulary))
    for token, index in named:
        # A byte-level token has a character for every byte.
        counts[index] = len(token) if content.is_byte_level else _length(token)
    for token, index in content.added_ids.items():
        counts[index] = 0 if token in content.control else len(token.encode())
    return counts


def _length(piece: str) -> int:
    if len(piece) == len("<0x00>") and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace(_SPACE, " ").encode())
