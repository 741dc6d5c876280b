"""The bytes of tokens add up to those of the text that they were made of."""

import numpy as np
import pytest

from megatron_qwen.data.tokenizers.token_bytes import token_bytes
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from tests.data.tokenizers.kinds import KINDS, training_texts

TEXTS = ["def f(x):\n    return x[1:20]", "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600", "two  spaces"]
# What a tokenizer adds to a text or takes from it.
_FIRST_BLANK = {"SentencePiece BPE", "SentencePiece unigram"}
_LOSES_TEXT = {"SentencePiece BPE without bytes", "SentencePiece unigram that drops blanks"}


def _encoded(directory, texts):
    counts, tokenizer = token_bytes(directory), load_tokenizer(directory)
    assert counts is not None
    assert len(counts) == tokenizer.vocab_size
    return [int(counts[np.array(ids, dtype=np.int64)].sum()) for ids in tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"WordPiece", *_LOSES_TEXT}])
def test_they_add_up(kind, tmp_path):
    KINDS[kind](tmp_path / "tokenizer")
    texts = [*TEXTS, *list(training_texts())[:3]]
    blank = int(kind in _FIRST_BLANK)
    assert _encoded(tmp_path / "tokenizer", texts) == [len(text.encode()) + blank for text in texts]


def test_control_tokens_are_no_text(tokenizer):
    assert _encoded(tokenizer, ["a<|endoftext|>b<|im_start|>"]) == [2]


def test_a_tokenizer_that_has_no_spaces_says_so(tmp_path):
    KINDS["WordPiece"](tmp_path / "tokenizer")
    assert token_bytes(tmp_path / "tokenizer") is None
