"""Which token ends a document: the tokenizer's own files say it, or the user."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.data.tokenizers.encoder import open_encoder
from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions, document_encoding, load_tokenizer
from megatron_qwen.errors import DataError

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def made(tokenizer: Path, target: Path, *, tokens: list[str] | None = None, **files: Any) -> Path:
    """A copy whose control tokens have other names, with other files beside it."""
    shutil.copytree(tokenizer, target)
    content = json.loads((target / "tokenizer.json").read_bytes())
    for token, name in zip(content["added_tokens"], tokens or TOKENS, strict=True):
        token["content"] = name
    (target / "tokenizer.json").write_text(json.dumps(content))
    (target / "tokenizer_config.json").unlink()
    for name, said in files.items():
        (target / f"{name}.json").write_text(said if isinstance(said, str) else json.dumps(said))
    return target


@pytest.mark.parametrize(
    ("tokens", "files", "asked", "wanted"),
    [
        (TOKENS, {}, None, 0),  # no file names one: Qwen's
        (TOKENS, {"tokenizer_config": {"eos_token": "<|endoftext|>"}}, None, 0),
        (TOKENS, {"tokenizer_config": {"eos_token": "<|im_end|>"}}, None, 0),  # instruct models: it ends a turn
        (TOKENS, {"tokenizer_config": {"eos_token": None}}, None, 0),
        (["<x>", "<y>", "</s>"], {"tokenizer_config": {"eos_token": "</s>"}}, None, 2),
        (["<x>", "<y>", "</s>"], {"tokenizer_config": {"eos_token": {"content": "</s>"}}}, None, 2),
        (["<x>", "<y>", "</s>"], {"special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": False}}}, None, 2),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], {}, "<|end_of_text|>", 1),
        (["<|endoftext|>", "<y>", "</s>"], {"tokenizer_config": {"eos_token": "</s>"}}, None, 2),
        (TOKENS, {"tokenizer_config": {"eos_token": "<|endoftext|>"}}, "<|im_end|>", 2),
    ],
)
def test_the_token_that_ends_a_document(tokens, files, asked, wanted, tokenizer, tmp_path):
    directory = made(tokenizer, tmp_path / "a", tokens=tokens, **files)
    first = json.loads((directory / "tokenizer.json").read_bytes())["added_tokens"][0]["id"]
    options = DocumentOptions(asked)
    assert load_tokenizer(directory, end=asked).end_of_text == first + wanted
    assert open_encoder(directory, options).end_of_text == first + wanted
    assert document_encoding(directory, options).end == first + wanted


def test_says_that_an_instruct_tokenizer_names_another(tokenizer, tmp_path):
    directory = made(tokenizer, tmp_path / "a", tokenizer_config={"eos_token": "<|im_end|>"})
    (note,) = document_encoding(directory, DocumentOptions()).notes
    assert "end with <|endoftext|>, not with <|im_end|>" in note
    assert document_encoding(directory, DocumentOptions("<|im_end|>")).notes == []


@pytest.mark.parametrize(
    ("tokens", "files", "asked", "told"),
    [
        (["<x>", "<y>", "<z>"], {}, None, "names no eos_token and has no token <|endoftext|>"),
        (
            ["<x>", "<y>", "<z>"],
            {"tokenizer_config": {"eos_token": "</s>"}},
            None,
            "names </s> as eos_token and has no",
        ),
        (TOKENS, {}, "<|end|>", "has no token <|end|>"),
        (["<x>", "<y>", "<z>"], {"tokenizer_config": {"eos_token": "<|im_end|>"}}, None, "has no token <|endoftext|>"),
        (TOKENS, {"tokenizer_config": "{"}, None, "is not valid JSON"),
    ],
)
def test_refused_by_name(tokens, files, asked, told, tokenizer, tmp_path):
    directory = made(tokenizer, tmp_path / "a", tokens=tokens, **files)
    for ask in (
        lambda: load_tokenizer(directory, end=asked).end_of_text,
        lambda: open_encoder(directory, DocumentOptions(asked)),
        lambda: document_encoding(directory, DocumentOptions(asked)),
    ):
        with pytest.raises(DataError, match=told.replace("|", r"\|")):
            ask()


def test_only_who_ends_documents_needs_the_token(tokenizer, tmp_path):
    """Data of a tokenizer without one is prepared with --end-token; what reads the data has no such option."""
    directory = made(tokenizer, tmp_path / "a", tokens=["<x>", "<y>", "<z>"])
    ours = load_tokenizer(directory)
    assert ours.decode(ours.encode_batch(["plain text"])[0]) == "plain text"
    encoder = open_encoder(directory, DocumentOptions("<z>"))
    assert encoder.end_of_text == ours.control_tokens["<z>"]


def test_the_slow_path_ends_documents_as_asked(tokenizer, tmp_path):
    """Of text that is not in normal form C, whose ids come from the tokenizer's own library."""
    directory = made(tokenizer, tmp_path / "a", tokens=["<x>", "<y>", "<z>"])
    content = json.loads((directory / "tokenizer.json").read_bytes())
    (directory / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "NFC"}}))
    encoder, text = open_encoder(directory, DocumentOptions("<z>")), "cafe\u0301 <z> \U00011380"
    (wanted,) = load_tokenizer(directory).encode_batch([text], control_as_text=True)
    assert [int(index) for piece in encoder.encode(text) for index in piece] == wanted
