"""Documents that spell control tokens: text unless asked otherwise, counted either way."""

import pytest

from megatron_qwen.data.prepare.job import prepare
from megatron_qwen.data.prepare.plan import make_plan
from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.token_files.manifest import Manifest
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.data.tokenizers import encoder as encoders
from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions, load_tokenizer
from tests.conftest import run
from tests.data.prepare.test_prepare import lying, write_jsonl

SPELLED = ["a <|endoftext|> b <|im_start|>user hi<|im_end|>", "plain", "<|endoftext|>" * 3, "x" * 100]


def make(tokenizer, prefix, source, **options) -> Manifest:
    plan = make_plan(
        find_inputs([source]).files,
        tokenizer=tokenizer,
        prefix=prefix,
        options=ReadOptions(),
        documents=DocumentOptions(**options),
        shard_bytes=60,
        unit_bytes=60,
    )
    noted = prepare(plan, workers=2)
    assert noted is not None
    return noted


def ids_of(prefix, noted) -> list[list[int]]:
    files = [TokenFile(prefix.with_name(name)) for name in noted.shards]
    return [file.document(index).tolist() for file in files for index in range(file.num_documents)]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("as_text", [True, False])
def test_counted_and_encoded_as_asked(fast, as_text, tokenizer, tmp_path, monkeypatch):
    if not fast:
        monkeypatch.setattr(encoders, "GigatokenEncoder", lambda *_: 1 / 0)
    noted = make(tokenizer, tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", SPELLED), control_as_text=as_text)
    assert noted.spelled_control_tokens == {"<|endoftext|>": 4, "<|im_start|>": 1, "<|im_end|>": 1}
    assert noted.control_tokens_in_text == ("text" if as_text else "tokens")
    ours = load_tokenizer(tokenizer)
    control = set(ours.spellable.values())
    found = ids_of(tmp_path / "out", noted)
    assert [ids[-1] for ids in found] == [ours.end_of_text] * len(SPELLED)
    assert found == [[*ids, ours.end_of_text] for ids in ours.encode_batch(SPELLED, control_as_text=as_text)]
    inside = [token for ids in found for token in ids[:-1] if token in control]
    assert len(inside) == (0 if as_text else 6)
    if as_text:
        assert [ours.decode(ids) for ids in found] == SPELLED


def test_the_choice_is_part_of_what_is_made(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", SPELLED)
    text, tokens = (make(tokenizer, tmp_path / str(one), source, control_as_text=one) for one in (True, False))
    other = make(tokenizer, tmp_path / "end", source, end_token="<|im_end|>")
    assert len({text.made_by, tokens.made_by, other.made_by}) == 3


def test_said_and_shown(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", SPELLED)
    done = run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", source, check=True)
    assert "documents spell control tokens (<|endoftext|> 4, <|im_start|> 1, <|im_end|> 1), encoded as text" in (
        done.stdout
    )
    shown = run("tools.data", "inspect", tmp_path / "out", check=True).stdout
    assert "<|endoftext|> 4" in shown
    plain = write_jsonl(tmp_path / "b.jsonl", ["plain"])
    done = run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "b", plain, check=True)
    assert "control" not in done.stdout


def test_documents_end_as_asked(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", SPELLED)
    noted = make(tokenizer, tmp_path / "out", source, end_token="<|im_end|>")
    assert noted.end_of_text == noted.control_tokens["<|im_end|>"]
    assert {ids[-1] for ids in ids_of(tmp_path / "out", noted)} == {noted.end_of_text}


@pytest.mark.parametrize("documents", [SPELLED, ["plain", "<|endoftext|>"]])
def test_an_encoder_that_is_wrong_about_spelled_tokens_is_not_used(documents, tokenizer, tmp_path, monkeypatch):
    """It is tried on them as soon as one document spells any; the probes have the others."""
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    right = make(tokenizer, tmp_path / "right", source)
    monkeypatch.setattr(encoders, "GigatokenEncoder", lying("<|im_start|>", "<|im_star|>"))
    noted = make(tokenizer, tmp_path / "out", source)
    assert "gigatoken gives other ids for" in noted.encoder
    assert noted.bin_xxh3_128 == right.bin_xxh3_128
