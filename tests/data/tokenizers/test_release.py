"""What is released loads elsewhere as what was trained: the class that the card names gives the ids of prepare."""

import functools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_qwen.data.tokenizers.encoder import PROBES, open_encoder
from megatron_qwen.data.tokenizers.release import AS_WRITTEN, AUTO, Loader, LoaderSearch, loader_of
from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions, Tokenizer, load_tokenizer
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


def found(directory: Path, reference: Tokenizer) -> Loader:
    return loader_of(directory, reference, where=directory, refusal="cannot be used", way_out="Use another.")


def changed(tokenizer: Path, target: Path, file: str = "tokenizer.json", **fields: Any) -> Path:
    """A copy, one file of which says something else."""
    shutil.copytree(tokenizer, target)
    content = json.loads((target / file).read_bytes())
    (target / file).write_text(json.dumps(content | fields))
    return target


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
    assert found(released, load_tokenizer(released)).name == wanted


def test_refused_where_no_class_gives_the_ids(tmp_path):
    """transformers' form of this normaliser treats letters with several marks otherwise than SentencePiece."""
    sentencepiece("bpe", normalization_rule_name="nmt_nfkc")(tmp_path / "tok")
    with pytest.raises(ConversionError, match="no class of transformers gives what the run was trained on") as caught:
        LoaderSearch(tmp_path / "tok", {"model_type": "qwen2"})
    assert "AutoTokenizer gives other ids (from id" in str(caught.value)
    assert "PreTrainedTokenizerFast gives other ids (from id" in str(caught.value)
    assert "--tokenizer" in str(caught.value)


def test_refused_where_no_form_is_known(tmp_path):
    sentencepiece("char")(tmp_path / "tok")
    with pytest.raises(ConversionError, match="neither a BPE nor a Unigram model"):
        LoaderSearch(tmp_path / "tok", {"model_type": "qwen2"})


def test_a_run_without_tokenizer_has_nothing_to_confirm():
    with LoaderSearch(None, {}) as search:
        search.begin()
        search.confirm()
    assert search.expected.name is None


@pytest.mark.parametrize("broken", [("AUTO",), ("AUTO", "AS_WRITTEN")])
def test_what_was_expected_is_tried(broken, tokenizer, monkeypatch):
    """A version of transformers that loads Qwen2's tokenizer wrongly: the other class is taken, if it is right."""
    with LoaderSearch(tokenizer, {"model_type": "qwen2"}) as search:
        assert search.expected == Loader(AUTO)
        for name in broken:
            monkeypatch.setattr(f"megatron_qwen.data.tokenizers.release.{name}", "BertTokenizer")
        search.begin()
        if len(broken) == 1:
            loader = search.confirm()
            assert (loader.name, "BertTokenizer" in str(loader.passed_over)) == (AS_WRITTEN, True)
        else:
            with pytest.raises(ConversionError, match="cannot be released"):
                search.confirm()


@pytest.mark.parametrize(
    ("model_type", "file", "fields"),
    [
        # Qwen2's class composes letters and marks (NFC); a file without a normalizer does not.
        ("qwen2", "tokenizer.json", {"normalizer": None}),
        # For qwen3 transformers takes the class that the files name, with GPT-2's own split.
        ("qwen3_moe", "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}),
    ],
)
def test_what_is_not_quite_qwen2s_is_tried_first(model_type, file, fields, tokenizer, tmp_path):
    directory = changed(tokenizer, tmp_path / "tok", file, **fields)
    with LoaderSearch(directory, {"model_type": model_type}) as search:
        assert search.expected.name == AS_WRITTEN
        assert "AutoTokenizer gives other ids" in str(search.expected.passed_over)
        search.begin()
        assert search.confirm() == search.expected
    released = written(search, tmp_path / "released", {"model_type": model_type})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(released)
    text = "cafe\u0301 it's 1234"
    assert theirs.encode(text, add_special_tokens=False) == load_tokenizer(directory).encode_batch([text])[0]


def test_without_transformers_nothing_is_tried(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with LoaderSearch(tokenizer, {"model_type": "qwen2"}) as search:
        search.begin()
        assert search.confirm() == Loader(None)
    assert found(tokenizer, load_tokenizer(tokenizer)) == Loader(None)


def test_dropout_is_off_in_a_release(tokenizer, tmp_path):
    model = json.loads((tokenizer / "tokenizer.json").read_bytes())["model"]
    directory = changed(tokenizer, tmp_path / "tok", model=model | {"dropout": 0.5}, normalizer=None)
    reference = load_tokenizer(directory)
    with LoaderSearch(directory, {"model_type": "qwen2"}) as search:
        assert search.confirm().name == AS_WRITTEN
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(written(search, tmp_path / "released", {}))
    text = "def function(argument):\n    return argument\n" * 4
    assert theirs.encode(text, add_special_tokens=False) == reference.encode_batch([text])[0]
    # Where others published it with dropout, it is compared without.
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    assert found(directory, reference).name == AS_WRITTEN


GPT2S_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"decoder": None}, "gives the same ids and decodes them to another text ("),
        ({"pre_tokenizer": GPT2S_SPLIT}, "gives other ids ("),
        ({"model": {}}, "cannot load it ("),
    ],
)
def test_says_what_is_wrong_with_each_class(fields, told, tokenizer, tmp_path):
    directory = changed(tokenizer, tmp_path / "tok", **fields)
    (directory / "config.json").write_text('{"model_type": "qwen3_moe"}')
    config = json.loads((directory / "tokenizer_config.json").read_bytes()) | {"tokenizer_class": AS_WRITTEN}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError) as caught:
        found(directory, load_tokenizer(tokenizer))
    message = str(caught.value)
    assert f"cannot be used: {AUTO} {told}" in message
    assert f"; {AS_WRITTEN} {told}" in message
    assert message.endswith("Use another.")


def test_shows_ids_from_the_first_that_differs(tokenizer, tmp_path):
    """Texts that begin alike would be shown as two equal lists."""
    directory = changed(tokenizer, tmp_path / "tok", pre_tokenizer=GPT2S_SPLIT)
    (directory / "config.json").write_text("{}")
    with pytest.raises(ConversionError) as caught:
        found(directory, load_tokenizer(tokenizer))
    shown = re.search(
        r"Fast gives other ids \(from id (\d+) of a text on, at .*: (\[.*\]) instead of (\[.*\])\)", str(caught.value)
    )
    assert shown is not None
    at, theirs, ours = int(shown[1]), json.loads(shown[2]), json.loads(shown[3])
    wanted = load_tokenizer(tokenizer).encode_batch([PROBES[0]])[0]
    assert at > len(ours)
    assert wanted[at : at + len(ours)] == ours
    assert theirs[0] != ours[0]
