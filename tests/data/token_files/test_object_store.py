"""Token files in an object store are read by range, and are the same tokens."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_qwen.data.prepare.job import ShardTask
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.token_files import object_store
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.errors import DataError
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run
from tests.data.prepare.test_prepare import TEXTS, make, write_jsonl


@pytest.fixture(scope="module")
def bucket(tokenizer, tmp_path_factory):
    """A set of shards, a single file and one with a mask, in the store ``data``."""
    root = tmp_path_factory.mktemp("store")
    source = write_jsonl(root / "a.jsonl", TEXTS)
    (root / "bucket").mkdir()
    make(tokenizer, root / "bucket" / "one", source)
    make(tokenizer, root / "bucket" / "set", source, task=ShardTask(), shard_bytes=60_000)
    (root / "p.jsonl").write_text(json.dumps({"prompt": "ask ", "text": "answer " * 50}) + "\n")
    make(tokenizer, root / "bucket" / "masked", root / "p.jsonl", prompt_field="prompt")
    return root / "bucket"


@pytest.fixture(autouse=True)
def store(bucket, tmp_path, monkeypatch):
    """The library's configuration: a profile whose store is a folder."""
    provider = {"storage_provider": {"type": "file", "options": {"base_path": str(bucket)}}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": {"data": provider}}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    monkeypatch.setenv(object_store.CACHE_VARIABLE, str(tmp_path / "cache"))
    import multistorageclient.shortcuts as shortcuts

    monkeypatch.setattr(shortcuts, "_STORAGE_CLIENT_CACHE", {})


@pytest.mark.parametrize("name", ["one", "set"])
def test_same_tokens_as_from_disk(name, bucket):
    here, there = TokenSet(bucket / name), TokenSet(f"msc://data/{name}")
    assert (there.num_tokens, there.num_documents) == (here.num_tokens, here.num_documents)
    assert there.digest == here.digest
    for start in range(0, here.num_tokens - 5_000, 3_001):
        assert there.tokens(start, start + 5_000).tolist() == here.tokens(start, start + 5_000).tolist()
        assert there.document_ends(start, start + 5_000).tolist() == here.document_ends(start, start + 5_000).tolist()


def test_a_mask_is_read_too(bucket):
    here, there = TokenSet(bucket / "masked"), TokenSet("msc://data/masked")
    assert there.loss_mask(0, there.num_tokens).tolist() == here.loss_mask(0, here.num_tokens).tolist()
    assert 0 in there.loss_mask(0, there.num_tokens)


def test_only_indices_are_fetched(bucket, tmp_path):
    TokenSet("msc://data/set").tokens(0, 1000)
    fetched = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in fetched} == {".idx", ".json"}
    times = {path: path.stat().st_mtime_ns for path in fetched}
    TokenSet("msc://data/set")
    assert {path: path.stat().st_mtime_ns for path in fetched} == times


def test_samples_are_the_same(bucket):
    def reader(path: str):
        config = RECIPES["tiny_dense"]().with_section("data", path=path, seq_length=64)
        return TrainingData(config).at(0)

    here, there = reader(str(bucket / "set")), reader("msc://data/set")
    assert all(here[number].tokens.tolist() == there[number].tokens.tolist() for number in range(50))


def test_a_run_trains_from_a_store(tokenizer, tmp_path):
    words = ["tiny_dense", "data.path=msc://data/one", f"data.tokenizer={tokenizer}", "training.train_iters=3"]
    run("launch.train", *words, "--run-dir", tmp_path / "run", check=True)
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("msc://data/nothing", "no such token file"),
        ("msc://elsewhere/one", "cannot be reached"),
        ("ftp://host/one", "cannot be reached"),
    ],
)
def test_what_is_not_there(url, named):
    with pytest.raises(DataError, match=named):
        TokenSet(url)


def test_a_file_that_is_shorter_than_its_index_says(bucket, tmp_path):
    copy = bucket / "short"
    for ending in (".idx", ".json", ".bin"):
        shutil.copyfile(bucket / f"one{ending}", Path(f"{copy}{ending}"))
    content = Path(f"{copy}.bin").read_bytes()
    Path(f"{copy}.bin").write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"msc://data/short.bin: is cut off"):
        TokenSet("msc://data/short")
    Path(f"{copy}.bin").write_bytes(content)
    tokens = TokenSet("msc://data/short")
    Path(f"{copy}.bin").write_bytes(content[: len(content) // 2])  # while a run is under way
    with pytest.raises(DataError, match=r"msc://data/short.bin: (gave|cannot be read)"):
        tokens.tokens(tokens.num_tokens - 100, tokens.num_tokens)
