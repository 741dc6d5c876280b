"""A tokenizer is what it does: files that do the same are one tokenizer, and nothing in them cuts or pads documents."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megatron_qwen.data.tokenizers.content import TokenizerContent
from megatron_qwen.data.tokenizers.encoder import open_encoder
from megatron_qwen.data.tokenizers.tokenizer import (
    DocumentOptions,
    document_encoding,
    file_sha256,
    fingerprint,
    load_tokenizer,
)
from megatron_qwen.errors import DataError

TEXTS = ["naïve café", "x = 10_000\n\n    return x", "word " * 600, "<|im_start|>user", "  two  blanks\r\n"]
TRUNCATION = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 1024}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}


def changed(tokenizer: Path, target: Path, change: Callable[[dict[str, Any]], object], **dump: Any) -> Path:
    """A copy of a tokenizer whose tokenizer.json is another."""
    shutil.copytree(tokenizer, target)
    content = json.loads((target / "tokenizer.json").read_bytes())
    change(content)
    (target / "tokenizer.json").write_text(json.dumps(content, **dump), encoding="utf-8")
    return target


def as_strings(content: dict[str, Any]) -> None:
    """Merges as versions of tokenizers before 0.20 write them."""
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def without_defaults(content: dict[str, Any]) -> None:
    for name in ("dropout", "unk_token", "byte_fallback", "ignore_merges", "fuse_unk"):
        content["model"].pop(name, None)


def as_older_versions_write(content: dict[str, Any]) -> None:
    """The form of files such as GPT-2's: no type of the model, no word about the regular expression."""
    as_strings(content)
    del content["model"]["type"]
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


SAME: dict[str, Callable[[dict[str, Any]], object]] = {
    "written anew": lambda _: None,
    "merges as strings": as_strings,
    "defaults left out": without_defaults,
    "fields in another order": lambda content: content.update(model=dict(reversed(content["model"].items()))),
    "vocabulary in another order": lambda content: content["model"].update(
        vocab=dict(reversed(content["model"]["vocab"].items()))
    ),
    "truncation": lambda content: content.update(truncation=TRUNCATION),
    "padding": lambda content: content.update(padding=PADDING),
    "post-processor": lambda content: content.update(post_processor=TEMPLATE),
    "dropout": lambda content: content["model"].update(dropout=0.5),
}


@pytest.mark.parametrize("how", SAME)
def test_the_same_tokenizer(how, tokenizer, tmp_path):
    other = changed(tokenizer, tmp_path / "other", SAME[how], indent=3, ensure_ascii=how == "written anew")
    assert file_sha256(other) != file_sha256(tokenizer)
    assert fingerprint(other) == fingerprint(tokenizer)
    for as_text in (True, False):
        ids = [load_tokenizer(one).encode_batch(TEXTS, control_as_text=as_text) for one in (tokenizer, other, other)]
        assert ids[0] == ids[1] == ids[2]
        assert len(ids[0][2]) >= 600


def test_a_file_of_an_older_version_saved_anew(tokenizer, tmp_path):
    older = changed(tokenizer, tmp_path / "older", as_older_versions_write)
    shutil.copytree(older, tmp_path / "newer")
    Tokenizer.from_file(str(older / "tokenizer.json")).save(str(tmp_path / "newer/tokenizer.json"))
    assert "use_regex" in (tmp_path / "newer/tokenizer.json").read_text()
    assert fingerprint(older) == fingerprint(tmp_path / "newer") != fingerprint(tokenizer)


def metaspace(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Metaspace", "replacement": "\u2581", **fields}]}
    )


def test_a_blank_before_the_first_word_in_either_form(tokenizer, tmp_path):
    forms = [
        {"add_prefix_space": True},
        {"add_prefix_space": True, "str_rep": "\u2581"},
        {"prepend_scheme": "always", "split": True},
        {"prepend_scheme": "never", "split": True},
    ]
    found = [
        fingerprint(changed(tokenizer, tmp_path / str(index), metaspace(**form))) for index, form in enumerate(forms)
    ]
    assert found[0] == found[1] == found[2] != found[3]


def swap_two_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


OTHER: dict[str, Callable[[dict[str, Any]], object]] = {
    "two tokens change places": swap_two_tokens,
    "two merges change places": lambda content: content["model"].update(
        merges=[*reversed(content["model"]["merges"][:2]), *content["model"]["merges"][2:]]
    ),
    "a merge less": lambda content: content["model"]["merges"].pop(),
    "another normaliser": lambda content: content.update(normalizer={"type": "NFKC"}),
    "no normaliser": lambda content: content.update(normalizer=None),
    "another pre-tokenizer": lambda content: content["pre_tokenizer"]["pretokenizers"].pop(0),
    "another added token": lambda content: content["added_tokens"][0].update(content="<|other|>"),
    "an added token that takes blanks": lambda content: content["added_tokens"][0].update(lstrip=True),
    "an added token that is special no more": lambda content: content["added_tokens"][0].update(special=False),
    "merges ignored": lambda content: content["model"].update(ignore_merges=True),
    "bytes as a last resort": lambda content: content["model"].update(byte_fallback=True),
}


@pytest.mark.parametrize("how", OTHER)
def test_another_tokenizer(how, tokenizer, tmp_path):
    assert fingerprint(changed(tokenizer, tmp_path / "other", OTHER[how])) != fingerprint(tokenizer)


def test_says_what_is_switched_off(tokenizer, tmp_path):
    def change(content: dict[str, Any]) -> None:
        content.update(truncation=TRUNCATION, padding=PADDING)
        content["model"]["dropout"] = 0.1

    assert document_encoding(tokenizer, DocumentOptions()).notes == []
    notes = document_encoding(changed(tokenizer, tmp_path / "a", change), DocumentOptions()).notes
    assert [note.split(" is switched off")[0] for note in notes] == [
        "truncation to 512 tokens",
        "padding to 1024 tokens",
        "dropout of merges (0.1)",
    ]


NOT = ["", "{}", "[]", '{"model": 1}', '{"model": {}, "added_tokens": [1]}', '{"model": {"vocab": 5}}']
NOT += ['{"model": {"vocab": [1, 2]}}', '{"model": {"vocab": {}}, "truncation": 5}', '{"model": {"vocab": [["a"]]}}']


@pytest.mark.parametrize("content", NOT)
def test_what_is_no_tokenizer(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_vocabulary_without_the_form_that_is_read(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match="save_pretrained"):
        load_tokenizer(tmp_path)


def test_added_words_that_are_no_control_tokens_stay_words(tokenizer, tmp_path):
    """A word that an owner has added is part of the vocabulary, whether or not documents spell control tokens."""
    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    library.add_tokens(["megatron"])
    library.normalizer = normalizers.NFC()
    shutil.copytree(tokenizer, tmp_path / "other")
    library.save(str(tmp_path / "other/tokenizer.json"))
    content = TokenizerContent(tmp_path / "other/tokenizer.json")
    word = library.token_to_id("megatron")
    assert word not in content.control.values()
    ours = load_tokenizer(tmp_path / "other")
    for as_text in (True, False):
        assert word in ours.encode_batch(["a megatron b<|im_start|>"], control_as_text=as_text)[0]


def test_an_end_token_that_a_file_calls_unknown_is_still_one_that_texts_spell(tokenizer, tmp_path):
    """As files of GPT-2's kind do; the model gives it for nothing, because it has all bytes."""
    other = changed(tokenizer, tmp_path / "a", lambda content: content["model"].update(unk_token="<|endoftext|>"))
    assert "<|endoftext|>" in TokenizerContent(other / "tokenizer.json").control
    (ids,) = load_tokenizer(other).encode_batch(["a<|endoftext|>b"], control_as_text=True)
    assert load_tokenizer(other).end_of_text not in ids


def test_control_tokens_of_qwen_that_its_files_do_not_call_special(tokenizer, tmp_path):
    def change(content: dict[str, Any]) -> None:
        last = copy.deepcopy(content["added_tokens"][-1])
        for index, name in enumerate(("<tool_call>", "<think>", "<|fim_prefix|>", "plain")):
            content["added_tokens"].append({**last, "id": last["id"] + 1 + index, "content": name, "special": False})

    content = TokenizerContent(changed(tokenizer, tmp_path / "a", change) / "tokenizer.json")
    assert list(content.control)[3:] == ["<tool_call>", "<think>", "<|fim_prefix|>"]


def words(*, vocabulary: list[str], unknown: str, added: list[str]) -> dict[str, Any]:
    """A tokenizer of whole words, which has no bytes to fall back to."""
    library = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=unknown))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(added)
    content: dict[str, Any] = json.loads(library.to_str())
    return content


def test_what_a_model_gives_for_unknown_words_is_not_spelled(tmp_path):
    content = words(vocabulary=["<|unk|>", "<s>", "a", "b"], unknown="<|unk|>", added=["<|unk|>", "<s>"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = load_tokenizer(tmp_path)
    assert ours.spellable == {"<s>": 1}
    assert ours.encode_batch(["a <s> z\u00fcrich"], control_as_text=True) == [[2, 0, 0]]
    assert ours.encode_batch(["a <s> z\u00fcrich"]) == [[2, 1, 0]]
    encoder = open_encoder(tmp_path, DocumentOptions("b"))
    assert [int(index) for piece in encoder.encode("a <s> z\u00fcrich") for index in piece] == [2, 0, 0]
    assert dict(encoder.spelled) == {1: 1}


def test_a_unigram_model_takes_no_control_token_from_text(tmp_path):
    """Its vocabulary has the control tokens among its pieces, as conversions of SentencePiece models do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("a", -1.0), ("<", -2.0), ("s", -2.0), (">", -2.0)]
    library = Tokenizer(models.Unigram(pieces, 0, False))
    library.normalizer = normalizers.NFKC()
    library.add_special_tokens(["<unk>", "<s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text in ("a<s>a", "a\uff1cs\uff1ea"):  # the second is normalised to the first
        assert ours.encode_batch([text], control_as_text=True) == [[2, 3, 4, 5, 2]]
    assert ours.encode_batch(["a<s>a"]) == [[2, 1, 2]]
    assert ours.vocab_size == 6
