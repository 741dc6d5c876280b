"""What is released loads elsewhere as what was trained: the class that the card names gives the ids of prepare."""

import functools
import json
from pathlib import Path

import pytest
import transformers

from megatron_qwen.data.tokenizers.encoder import open_encoder
from megatron_qwen.data.tokenizers.release import AS_WRITTEN, AUTO, LoaderSearch, loader_of
from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions, load_tokenizer
from megatron_qwen.errors import ConversionError
from tests.data.tokenizers.kinds import KINDS, sentencepiece, texts_of_all_scripts

texts = functools.cache(texts_of_all_scripts)
# Without bytes for what it does not know, or with letters made alike, a tokenizer does not give the text back.
LOSSY = ("WordPiece", "SentencePiece BPE without bytes", "SentencePiece unigram that drops blanks")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    @functools.cache
    def make(kind: str) -> Path:
        directory = tmp_path_factory.mktemp("kinds") / kind.replace(" ", "_")
        KINDS[kind](directory)
        return directory

    return make


def written(search: LoaderSearch, directory: Path, config: dict[str, str]) -> Path:
    directory.mkdir()
    for name, content in search.files.items():
        (directory / name).write_bytes(content)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["Qwen2", *KINDS])
def test_ids_of_prepare_are_those_of_the_release(kind, model_type, made, tokenizer, tmp_path):
    directory = tokenizer if kind == "Qwen2" else made(kind)
    config = {"model_type": model_type}
    with LoaderSearch(directory, config) as search:
        search.begin()
        search.confirm()
    # For qwen2 transformers builds Qwen2's own class, whatever the files say.
    wanted = AUTO if kind == "Qwen2" or model_type != "qwen2" else AS_WRITTEN
    if kind == "GPT-2" and model_type != "qwen2":
        wanted = search.expected.name  # either is right: its class is known to transformers
    assert search.expected.name == wanted
    assert (search.expected.passed_over is None) == (wanted == AUTO)
    released = written(search, tmp_path / "released", config)
    theirs = getattr(transformers, wanted).from_pretrained(released)
    encoder = open_encoder(directory, DocumentOptions())
    count = 2000 if model_type == "qwen2" else 200
    for text in texts(2000)[:: 2000 // count]:
        ids = [int(number) for piece in encoder.encode(text) for number in piece]
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        if kind not in LOSSY:
            assert theirs.decode(ids) == text
    assert theirs.convert_tokens_to_ids("<|endoftext|>") == load_tokenizer(directory).end_of_text
    # `mq generate` finds the same class on what was written.
    assert loader_of(released, load_tokenizer(released), where=released).name == wanted


def test_refused_where_no_class_gives_the_ids(tmp_path):
    """transformers' form of this normaliser treats letters with several marks otherwise than SentencePiece."""
    sentencepiece("bpe", normalization_rule_name="nmt_nfkc")(tmp_path / "tok")
    with pytest.raises(ConversionError, match="transformers gives other ids than the run was trained on"):
        LoaderSearch(tmp_path / "tok", {"model_type": "qwen2"})


def test_refused_where_no_form_is_known(tmp_path):
    sentencepiece("char")(tmp_path / "tok")
    with pytest.raises(ConversionError, match="neither a BPE nor a Unigram model"):
        LoaderSearch(tmp_path / "tok", {"model_type": "qwen2"})


def test_a_run_without_tokenizer_has_nothing_to_confirm():
    with LoaderSearch(None, {}) as search:
        search.begin()
        search.confirm()
    assert search.expected.name is None


def test_what_was_expected_is_confirmed(tokenizer, monkeypatch):
    """A version of transformers that loads Qwen2's tokenizer wrongly is noticed before anything is released."""
    monkeypatch.setattr("megatron_qwen.data.tokenizers.release.AUTO", "BertTokenizer")
    with LoaderSearch(tokenizer, {"model_type": "qwen2"}) as search:
        search.begin()
        monkeypatch.setattr("megatron_qwen.data.tokenizers.release.AS_WRITTEN", "BertTokenizer")
        with pytest.raises(ConversionError, match="cannot be released"):
            search.confirm()
