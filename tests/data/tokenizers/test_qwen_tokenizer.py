"""The tokenizer made of Qwen's rank file gives the ids of Hugging Face's Qwen2 class, and gigatoken gives the same."""

import functools
import itertools
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from launch.demo import standard_library
from megatron_qwen.data.tokenizers import encoder as encoders
from megatron_qwen.data.tokenizers.encoder import PROBES, GigatokenEncoder, difference, open_encoder
from megatron_qwen.data.tokenizers.making import QWEN2_5_CONTROL_TOKENS
from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions, load_tokenizer
from tests.conftest import run

# Bytes that are no UTF-8, as a reader of such a file would hand them over.
INVALID = [
    bytes(raw).decode(errors="replace") for raw in (b"\xff\xfe", b"ab\xe4\xbd", b"\xf0\x9f\x98", b"\xc0\xaf\x80")
]


encoder_of = functools.cache(open_encoder)
AS_TEXT, AS_TOKENS = DocumentOptions(), DocumentOptions(control_as_text=False)
tokenizer_of = functools.cache(load_tokenizer)


@pytest.fixture(scope="module")
def oracle(qwen):
    return Qwen2Tokenizer.from_pretrained(qwen)


def test_ids_of_the_family(qwen):
    ours = load_tokenizer(qwen)
    assert ours.vocab_size == 151_665
    assert ours.end_of_text == 151_643
    assert list(ours.control_tokens.items()) == list(zip(QWEN2_5_CONTROL_TOKENS, range(151_643, 151_665), strict=True))
    added = json.loads((qwen / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [entry["special"] for entry in added.values()] == [True] * 14 + [False] * 8


def test_equal_ids_with_transformers(qwen, oracle):
    texts = [*PROBES, *INVALID, *(document["text"] for document in standard_library(400_000))]
    ours = load_tokenizer(qwen).encode_batch(texts)
    assert ours == [oracle(text, add_special_tokens=False)["input_ids"] for text in texts]
    for options in (AS_TEXT, AS_TOKENS):
        assert difference(encoder_of(qwen, options), tokenizer_of(qwen), texts, options) is None
    assert encoder_of(qwen, AS_TEXT).name == "gigatoken"


def test_documents_that_spell_control_tokens(qwen, oracle):
    """As text they decode to what they say, from any place in the text; as tokens they are transformers' own."""
    texts = [
        *(f"a{name}b" for name in QWEN2_5_CONTROL_TOKENS),
        *(f"{name} e\u0301 \u4f60{name}\n{name}" for name in QWEN2_5_CONTROL_TOKENS),
        "x" * 500 + "<|im_start|>system\nSay hello.<|im_end|>\n" * 3,
    ]
    text, token = encoder_of(qwen, AS_TEXT), encoder_of(qwen, AS_TOKENS)
    assert difference(text, tokenizer_of(qwen), texts, AS_TEXT) is None
    assert difference(token, tokenizer_of(qwen), texts, AS_TOKENS) is None
    for one in texts:
        as_text = [int(number) for piece in text.encode(one) for number in piece]
        assert max(as_text) < 151_643
        assert oracle.decode(as_text) == unicodedata.normalize("NFC", one)
        as_tokens = [int(number) for piece in token.encode(one) for number in piece]
        assert as_tokens == oracle(one, add_special_tokens=False)["input_ids"]
        assert text.spelled == token.spelled, one
    assert sum(text.spelled.values()) == 22 + 3 * 22 + 6


def test_text_on_which_tables_of_unicode_differ(qwen):
    """Marks out of order, decomposed letters, scripts of Unicode 16; each alone and inside a text."""
    texts = [
        "a\u07f3\u07fd",
        "\u07fd\u07f3",
        "e\u0301",
        "q\u0307\u0323",
        "\U000113c2",
        "\U0001611e\U0001611e",
        "\U00016d67",
    ]
    assert (
        difference(
            encoder_of(qwen, AS_TEXT), tokenizer_of(qwen), [*texts, *(f"x {text} y\n{text}" for text in texts)], AS_TEXT
        )
        is None
    )


def test_every_character(qwen):
    """All that Unicode has assigned, between letters, doubled, before a digit, after a line end."""
    assigned = (code for code in range(1, 0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Co", "Cn"))
    for codes in itertools.batched(assigned, 20_000):
        texts = [f"x{chr(code)}y {chr(code)}{chr(code)} {chr(code)}1\n{chr(code)}" for code in codes]
        assert difference(encoder_of(qwen, AS_TEXT), tokenizer_of(qwen), texts, AS_TEXT) is None


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_gigatoken_gives_equal_ids_for_any_text(qwen, text):
    assert difference(encoder_of(qwen, AS_TEXT), tokenizer_of(qwen), [text], AS_TEXT) is None


def test_a_long_document_in_parts(qwen, monkeypatch):
    """Cut between a line end and a letter, the ids are those of the whole."""
    text = "".join(document["text"] for document in standard_library(300_000)) + "\n\n  \r\nnaïve\n你好\nmore"
    encoder = GigatokenEncoder(qwen, AS_TEXT)
    whole = [int(number) for piece in encoder.encode(text) for number in piece]
    monkeypatch.setattr(encoders, "_PART_CHARACTERS", 50)
    pieces = list(encoder.encode(text))
    assert len(pieces) > 400
    assert [int(number) for piece in pieces for number in piece] == whole


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"not base64!! 0\n", ":1"),
        (b"IQ== 0\nIg== 2\n", ":2"),
        (b"IQ== 0\n", "lacks 255 of the 256 single bytes"),
        (b"", "lacks 256"),
    ],
)
def test_a_file_that_is_no_rank_file(content, named, tmp_path):
    (tmp_path / "ranks").write_bytes(content)
    done = run("tools.data", "tokenizer", "import-tiktoken", tmp_path / "ranks", "--output", tmp_path / "out")
    assert done.returncode == 3
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
