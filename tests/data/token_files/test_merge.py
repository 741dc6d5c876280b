"""Token files joined: linked as shards, or written as one; the same tokens either way."""

import itertools
import json
from dataclasses import replace

import pytest

from megatron_qwen.data.prepare.job import prepare
from megatron_qwen.data.prepare.plan import make_plan
from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.token_files.manifest import read_manifest, write_manifest
from megatron_qwen.data.token_files.merge import merge
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.data.token_files.verify import verify
from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions, file_sha256
from megatron_qwen.errors import ConfigError, DataError
from tests.conftest import run
from tests.data.blends import write_source
from tests.data.prepare.test_prepare import TEXTS, make, write_jsonl


@pytest.fixture(scope="module")
def three(tokenizer, tmp_path_factory):
    """Two files and a set of shards."""
    root = tmp_path_factory.mktemp("three")
    for name, texts in (("a", TEXTS[:5]), ("b", TEXTS[5:8]), ("c", TEXTS[8:])):
        more = {"shard_bytes": 40_000} if name == "c" else {}
        make(tokenizer, root / name, write_jsonl(root / f"{name}.jsonl", texts), **more)
    return [root / name for name in "abc"]


def everything(prefix) -> list[int]:
    tokens = TokenSet(prefix)
    return tokens.tokens(0, tokens.num_tokens).tolist()


@pytest.mark.parametrize("single", [True, False])
def test_same_tokens(single, three, tmp_path):
    made = merge(three, tmp_path / "all", single=single)
    assert everything(tmp_path / "all") == list(itertools.chain(*map(everything, three)))
    noted = verify(tmp_path / "all")
    assert noted == made
    assert noted.documents == len(TEXTS)
    if single:
        assert TokenFile(tmp_path / "all").num_documents == len(TEXTS)
    else:  # no token was copied
        first = tmp_path / f"{noted.shards[0]}.bin"
        assert first.stat().st_ino == three[0].with_name("a.bin").stat().st_ino


def test_a_set_reads_like_one_file(three, tmp_path):
    merge(three, tmp_path / "set", single=False)
    merge(three, tmp_path / "one", single=True)
    tokens, file = TokenSet(tmp_path / "set"), TokenFile(tmp_path / "one")
    assert (tokens.num_tokens, tokens.num_documents) == (file.num_tokens, file.num_documents)
    for document in range(file.num_documents + 1):
        assert tokens.document_start(document) == file.document_start(document)
    assert tokens.lengths(0, file.num_documents).tolist() == file.lengths(0, file.num_documents).tolist()
    for start in range(0, file.num_tokens - 9_000, 7_919):
        assert tokens.tokens(start, start + 9_000).tolist() == file.tokens(start, start + 9_000).tolist()
        assert tokens.document_ends(start, start + 9_000).tolist() == file.document_ends(start, start + 9_000).tolist()
        assert tokens.document_at(start) == file.document_at(start)
    first, second = tokens.files[:2]
    end = int(first.lengths(0, first.num_documents)[-1]) - 1
    assert tokens.places(first.num_tokens - 1, first.num_tokens + 2) == [
        f"{first.prefix}.bin, document {first.num_documents - 1}, token {end}",
        f"{second.prefix}.bin, document 0, tokens 0 to 1",
    ]


def test_a_mask_is_joined_too(tokenizer, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "ask ", "text": "answer"}) + "\n")
    make(tokenizer, tmp_path / "p", tmp_path / "p.jsonl", prompt_field="prompt")
    make(tokenizer, tmp_path / "q", write_jsonl(tmp_path / "q.jsonl", ["plain"]))
    merge([tmp_path / "q", tmp_path / "p"], tmp_path / "all", single=True)
    verify(tmp_path / "all")
    file, first = TokenFile(tmp_path / "all"), TokenFile(tmp_path / "q").num_tokens
    assert file.loss_mask(0, first).tolist() == [1] * first
    assert 0 in file.loss_mask(first, file.num_tokens).tolist()


def test_what_does_not_belong_together(three, qwen, tmp_path):
    make(qwen, tmp_path / "other", write_jsonl(tmp_path / "x.jsonl", ["text"]))
    with pytest.raises(DataError, match="was made with another tokenizer"):
        merge([three[0], tmp_path / "other"], tmp_path / "all", single=False)
    write_source(tmp_path / "bare", 100)
    with pytest.raises(DataError, match="has no manifest"):
        merge([three[0], tmp_path / "bare"], tmp_path / "all", single=False)
    (tmp_path / "all.idx").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        merge(three, tmp_path / "all", single=True)
    assert (tmp_path / "all.idx").read_text() == "mine"


def test_files_that_differ_in_what_became_of_control_tokens(tokenizer, tmp_path):
    for name, as_text in (("a", True), ("b", False)):
        plan = make_plan(
            find_inputs([write_jsonl(tmp_path / f"{name}.jsonl", ["<|im_start|>"])]).files,
            tokenizer=tokenizer,
            prefix=tmp_path / name,
            options=ReadOptions(),
            documents=DocumentOptions(control_as_text=as_text),
        )
        prepare(plan, workers=1)
    noted = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all", single=True)
    assert noted.control_tokens_in_text == "text and tokens"
    assert noted.spelled_control_tokens == {"<|im_start|>": 2}


def test_a_manifest_of_an_older_version_may_mean_the_same_tokenizer(three, tokenizer, tmp_path):
    make(tokenizer, tmp_path / "old", write_jsonl(tmp_path / "x.jsonl", ["text"]))
    noted = read_manifest(tmp_path / "old")
    write_manifest(tmp_path / "old", replace(noted, tokenizer_sha256=file_sha256(tokenizer)))
    with pytest.raises(DataError, match="made by an older version"):
        merge([three[0], tmp_path / "old"], tmp_path / "all", single=False)


def test_inspect_draws_and_counts(three, tokenizer, tmp_path):
    arguments = [*three, "--tokenizer", tokenizer, "--histogram", tmp_path / "lengths.png"]
    shown = json.loads(run("tools.data", "inspect", *arguments, "--json", check=True).stdout)
    assert list(shown) == [str(prefix) for prefix in three]
    for prefix, facts in zip(three, shown.values(), strict=True):
        assert sum(row["documents"] for row in facts["lengths"]) == facts["documents"]
        assert sum(row["tokens"] for row in facts["lengths"]) == facts["tokens"] == TokenSet(prefix).num_tokens
        assert facts["longest_documents"][0]["tokens"] == TokenSet(prefix).lengths(0, facts["documents"]).max()
        assert facts["bytes_per_token"] == pytest.approx(facts["text_bytes"] / facts["tokens"])
        assert len(facts["samples"]) == 3
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "longest documents" in run("tools.data", "inspect", three[2], check=True).stdout
