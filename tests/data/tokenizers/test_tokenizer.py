"""Tokenizers: lossless, in Qwen's form, and the same ids through transformers."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_qwen.data.token_files.manifest import read_manifest
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.data.token_files.verify import verify
from megatron_qwen.data.tokenizers.encoder import open_encoder
from megatron_qwen.data.tokenizers.tokenizer import (
    CONTROL_TOKENS,
    END_OF_TEXT,
    DocumentOptions,
    document_encoding,
    load_tokenizer,
)
from megatron_qwen.errors import DataError
from tests.conftest import run
from tests.data.tokenizers.kinds import sentencepiece

TEXTS = ["def f(x):\n    return x[1:20]\n", "naïve café — 你好 \U0001f600\t\r\n", " leading", "", "12345"]


def test_byte_level_bpe(tokenizer):
    ours = load_tokenizer(tokenizer)
    assert ours.vocab_size == 320
    assert [ours.decode(ids) for ids in ours.encode_batch(TEXTS)] == TEXTS
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    assert [theirs(text)["input_ids"] for text in TEXTS] == ours.encode_batch(TEXTS)
    assert theirs.eos_token_id == ours.end_of_text
    assert theirs.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [317, 318, 319]
    # Digits stand alone, as in Qwen's pre-tokenizer.
    assert len(ours.encode_batch(["12345"])[0]) == 5


def test_text_of_a_control_token_is_no_surprise(tokenizer):
    ours = load_tokenizer(tokenizer)
    assert ours.encode_batch([END_OF_TEXT])[0] == [ours.end_of_text]


def test_sentencepiece_end_to_end(corpus, tmp_path):
    made = run(
        "tools.data",
        "tokenizer",
        "train",
        "--kind",
        "sentencepiece",
        "--vocab-size",
        600,
        "--output",
        tmp_path / "sp",
        corpus,
    )
    assert made.returncode == 0, made.stderr
    ours = load_tokenizer(tmp_path / "sp")
    assert ours.vocab_size == 600
    assert ours.decode(ours.encode_batch(["def f(x):"])[0]).strip() == "def f(x):"
    run("tools.data", "prepare", "--tokenizer", tmp_path / "sp", "--output", tmp_path / "tokens", corpus, check=True)
    verify(tmp_path / "tokens")
    file = TokenFile(tmp_path / "tokens")
    assert file.document(0)[-1] == ours.end_of_text


CHAT = ["<|im_start|>", "<|im_end|>"]
ASKED = "<|im_start|>user hi<|im_end|> </s> <s>"


@pytest.fixture(scope="module", params=["user_defined_symbols", "control_symbols"])
def chat_model(request, tmp_path_factory) -> tuple[str, Path]:
    """A SentencePiece model with the tokens of a chat, as either kind of piece."""
    directory = tmp_path_factory.mktemp("sp") / "model"
    sentencepiece("bpe", eos_piece="</s>", bos_id=2, **{request.param: CHAT})(directory)
    return request.param, directory


def test_control_pieces_of_a_sentencepiece_model(chat_model):
    kind, directory = chat_model
    ours = load_tokenizer(directory)
    control = {index for name, index in ours.spellable.items() if name in (*CHAT, "<s>", "</s>")}
    (text,), (tokens,) = (ours.encode_batch([ASKED], control_as_text=as_text) for as_text in (True, False))
    assert ours.decode(text) == ASKED
    assert not control & set(text)
    if kind == "control_symbols":  # such a model takes none from a text
        assert ours.spellable == {}
        assert tokens == text
        with pytest.raises(DataError, match=r"--control-tokens = encode: is not possible.*<\|im_start\|>"):
            document_encoding(directory, DocumentOptions(control_as_text=False))
    else:
        assert sorted(ours.spellable) == sorted([*CHAT, "<s>", "</s>"])
        assert [index for index in tokens if index in control] == [
            ours.spellable[name] for name in (*CHAT, "</s>", "<s>")
        ]
        for as_text, wanted in ((True, text), (False, tokens)):
            encoder = open_encoder(directory, DocumentOptions(control_as_text=as_text))
            assert [int(index) for piece in encoder.encode(ASKED) for index in piece] == wanted
            assert dict(encoder.spelled) == dict.fromkeys(control, 1)


def test_the_end_of_a_document_of_a_sentencepiece_model(chat_model, tmp_path):
    """As for a tokenizer.json: its other files say it, or the user; else its own piece does."""
    _, directory = chat_model
    ids = {name: load_tokenizer(directory, end=name).end_of_text for name in ("</s>", "<s>", *CHAT)}
    assert len(set(ids.values())) == 4
    shutil.copytree(directory, tmp_path / "a")
    for said, wanted in ((None, "</s>"), ("<s>", "<s>"), ("<|im_end|>", "</s>")):
        (tmp_path / "a/tokenizer_config.json").write_text(json.dumps({"eos_token": said}))
        assert load_tokenizer(tmp_path / "a").end_of_text == ids[wanted]
        encoding = document_encoding(tmp_path / "a", DocumentOptions())
        assert encoding.end == ids[wanted]
        assert any("ends a turn" in note for note in encoding.notes) == (said == "<|im_end|>")
    with pytest.raises(DataError, match=r"has no token <\|end\|>"):
        document_encoding(directory, DocumentOptions("<|end|>"))


def test_prepared_text_is_the_text(corpus, tokenizer, tokens):
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    ours, file = load_tokenizer(tokenizer), TokenFile(tokens)
    assert file.num_documents == len(documents)
    for index, text in enumerate(documents):
        ids = file.document(index).tolist()
        assert ids[-1] == ours.end_of_text
        assert ours.decode(ids[:-1]) == text
    noted = read_manifest(tokens)
    assert noted.tokens == file.num_tokens
    assert noted.documents == len(documents)


def test_inspect_and_verify(tokens, tokenizer):
    shown = json.loads(run("tools.data", "inspect", tokens, "--tokenizer", tokenizer, "--json", check=True).stdout)
    assert shown["tokens"] == TokenFile(tokens).num_tokens
    assert shown["first_text"]
    assert "every byte, count, id and the index match" in run("tools.data", "verify", tokens, check=True).stdout


@pytest.fixture
def copy(tokens, tmp_path):
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"a{ending}").write_bytes(tokens.with_name(tokens.name + ending).read_bytes())
    return tmp_path / "a"


def test_verify_finds_a_count_that_is_wrong(copy):
    noted = json.loads(copy.with_suffix(".json").read_text())
    copy.with_suffix(".json").write_text(json.dumps({**noted, "tokens": 5, "documents": 1}))
    with pytest.raises(DataError) as caught:
        verify(copy)
    assert len(caught.value.problems) == 2


def test_verify_finds_a_changed_token_and_a_changed_index(copy):
    content = bytearray(copy.with_suffix(".bin").read_bytes())
    content[1000] ^= 1
    copy.with_suffix(".bin").write_bytes(content)
    index = bytearray(copy.with_suffix(".idx").read_bytes())
    index[34 + 4] ^= 1  # the length of the second document
    copy.with_suffix(".idx").write_bytes(index)
    with pytest.raises(DataError) as caught:
        verify(copy)
    assert [problem.where.rsplit(".", 1)[1] for problem in caught.value.problems] == ["idx", "bin"]


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"tokens": "many"}'])
def test_a_damaged_manifest_is_one_message(content, copy):
    copy.with_suffix(".json").write_text(content)
    with pytest.raises(DataError, match="is damaged; prepare the data again"):
        read_manifest(copy)


def test_prepare_overwrites_nothing(corpus, tokenizer, tmp_path):
    (tmp_path / "mine.json").write_text("precious")
    done = run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "mine", corpus)
    assert done.returncode == 2
    assert "mine.json" in done.stderr
    assert "exists already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_a_vocabulary_that_is_too_small(corpus, tmp_path):
    done = run("tools.data", "tokenizer", "train", "--vocab-size", 200, "--output", tmp_path / "tok", corpus)
    assert done.returncode == 2
    assert "must be from 259" in done.stderr
