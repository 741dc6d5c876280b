"""Text of every form to token files: the right tokens, every record accounted for, the bytes that Megatron writes."""

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import AddedToken, Tokenizer

from launch.demo import standard_library
from megatron_qwen import files
from megatron_qwen.data.prepare import join
from megatron_qwen.data.prepare.job import ShardTask, prepare
from megatron_qwen.data.prepare.plan import make_plan
from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.token_files.manifest import read_manifest
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.data.tokenizers import encoder as encoders
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from tests.conftest import run

TEXTS = [document["text"] for document in standard_library(300_000)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make(tokenizer: Path, prefix: Path, *names: Any, unit_bytes: int = 20_000, workers: int = 2, **more: Any) -> Any:
    """Prepares in this process, in small units."""
    options = ReadOptions(**{key: more.pop(key) for key in list(more) if key in ReadOptions.__dataclass_fields__})
    task = more.pop("task", ShardTask())
    plan = make_plan(
        find_inputs(names).files, tokenizer=tokenizer, prefix=prefix, options=options, unit_bytes=unit_bytes, **more
    )
    return prepare(plan, workers=workers, task=task)


def texts_of(prefix: Path, tokenizer: Path) -> list[str]:
    file, ours = TokenSet(prefix), load_tokenizer(tokenizer)
    found = []
    for document in range(file.num_documents):
        ids = file.tokens(file.document_start(document), file.document_start(document + 1)).tolist()
        assert ids[-1] == ours.end_of_text
        found.append(ours.decode(ids[:-1]))
    return found


def test_every_form_and_packing(tokenizer, tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=5)
    (tmp_path / "e.txt").write_text(TEXTS[0])
    (tmp_path / "f.txt.zst").write_bytes(zstandard.compress(TEXTS[1].encode()))
    noted = make(tokenizer, tmp_path / "out" / "all", tmp_path)
    assert texts_of(tmp_path / "out" / "all", tokenizer) == [*TEXTS * 4, TEXTS[0], TEXTS[1]]
    assert noted.encoder == "gigatoken"
    assert (noted.read, noted.documents) == (4 * len(TEXTS) + 2, 4 * len(TEXTS) + 2)
    assert noted.text_bytes > 4 * sum(map(len, TEXTS))


def test_many_members_of_one_packed_file(tokenizer, tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    make(tokenizer, tmp_path / "out", tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.zst")
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS * 2


def build_with_megatron(prefix: str, documents: list[list[int]], wide: bool) -> None:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder: Any = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32 if wide else np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(prefix + ".idx")


@pytest.mark.parametrize("which", ["small", "qwen"])
def test_bytes_as_megatron_writes_them(which, tokenizer, qwen, pool, tmp_path):
    directory = {"small": tokenizer, "qwen": qwen}[which]
    make(directory, tmp_path / "ours", write_jsonl(tmp_path / "a.jsonl", TEXTS))
    ours = load_tokenizer(directory)
    documents = [[*ids, ours.end_of_text] for ids in ours.encode_batch(TEXTS)]
    pool[1].run(build_with_megatron, str(tmp_path / "theirs"), documents, which == "qwen")
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


def test_bytes_do_not_depend_on_workers_or_units(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    made = set()
    for number, (workers, unit_bytes) in enumerate([(1, 1 << 20), (2, 997), (3, 33_333)]):
        make(tokenizer, tmp_path / f"out{number}", source, workers=workers, unit_bytes=unit_bytes)
        made.add(tuple((tmp_path / f"out{number}{ending}").read_bytes() for ending in (".bin", ".idx")))
    assert len(made) == 1


def test_shards_by_several_tasks(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = make(tokenizer, tmp_path / "whole", source)
    cut = {"shard_bytes": 60_000}
    assert make(tokenizer, tmp_path / "out", source, task=ShardTask(1, 2), **cut) is None
    noted = make(tokenizer, tmp_path / "out", source, task=ShardTask(0, 2), **cut)
    assert len(noted.shards) > 2
    assert noted.tokens == whole.tokens
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS
    run("tools.data", "verify", tmp_path / "out", check=True)
    assert not (tmp_path / "out.work").exists()
    # The same command finds its work done.
    assert make(tokenizer, tmp_path / "out", source, task=ShardTask(0, 2), **cut) == noted


def test_every_record_is_accounted_for(tokenizer, tmp_path):
    random.seed(0)
    kinds = ["good", "empty", "other", "bad", "blank", "field"]
    lines, counts = [], dict.fromkeys(kinds, 0)
    for text in TEXTS * 8:
        kind = random.choice(kinds)
        counts[kind] += 1
        lines.append(
            {
                "good": json.dumps({"text": text[:500], "lang": "en", "score": 0.7}),
                "empty": json.dumps({"text": "", "lang": "en", "score": 0.9}),
                "other": json.dumps({"text": text[:500], "lang": random.choice(["de", None]), "score": 0.9}),
                "bad": '{"text": "half',
                "blank": "",
                "field": json.dumps({"body": "x"}),
            }[kind]
        )
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--tokenizer", tokenizer, "--output", tmp_path / "out", "--where", "lang=en", "--where", "score>=0.5"]
    done = run("tools.data", "prepare", *arguments, "--on-error", "skip", "--json", tmp_path / "a.jsonl", check=True)
    noted = json.loads(done.stdout)
    assert noted["documents"] == counts["good"]
    assert noted["filtered"] == counts["other"]
    assert noted["empty"] == counts["empty"]
    assert noted["skipped"] == counts["bad"] + counts["field"]
    assert noted["read"] == len(lines) - counts["blank"]
    assert noted["read"] == sum(noted[name] for name in ("documents", "empty", "filtered", "skipped"))
    aside = [json.loads(line) for line in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert len(aside) == noted["skipped"]
    for one in aside:
        number = int(one["where"].rsplit(":", 1)[1])
        assert lines[number - 1] == one["raw"]


def test_a_prompt_carries_no_loss(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Say hello: ", "text": "hello there"}) + "\n")
    make(tokenizer, tmp_path / "out", tmp_path / "a.jsonl", prompt_field="prompt")
    file, ours = TokenFile(tmp_path / "out"), load_tokenizer(tokenizer)
    prompt, text = ours.encode_batch(["Say hello: ", "hello there"])
    assert file.document(0).tolist() == [*prompt, *text, ours.end_of_text]
    assert file.loss_mask(0, file.num_tokens).tolist() == [0] * len(prompt) + [1] * (len(text) + 1)


def test_documents_of_a_text_file_by_separator(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one\n%%\ntwo\r\n%%\n\n%%\nthree\n")
    noted = make(tokenizer, tmp_path / "out", tmp_path / "a.txt", separator="%%\n")
    assert texts_of(tmp_path / "out", tokenizer) == ["one\n", "two\r\n", "three\n"]
    assert (noted.read, noted.empty) == (4, 1)


def lying(said: str, heard: str) -> type[encoders.GigatokenEncoder]:
    """A fast encoder that is wrong about one text."""

    class Lying(encoders.GigatokenEncoder):
        def encode(self, text):
            yield from super().encode(text.replace(said, heard))

    return Lying


def test_an_encoder_that_is_wrong_is_not_used(tokenizer, tmp_path, monkeypatch, caplog):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    right = make(tokenizer, tmp_path / "right", source)
    monkeypatch.setattr(encoders, "GigatokenEncoder", lying("q", "k"))
    noted = make(tokenizer, tmp_path / "out", source)
    assert "gigatoken gives other ids for" in noted.encoder
    assert "slower" in caplog.text
    assert noted.bin_xxh3_128 == right.bin_xxh3_128


def test_a_sample_of_every_unit_is_compared(tokenizer, tmp_path, monkeypatch):
    """Wrong ids that no probe shows are found in the data."""
    monkeypatch.setattr("megatron_qwen.data.tokenizers.encoder.PROBES", ())
    monkeypatch.setattr(encoders, "GigatokenEncoder", lying("q", "k"))
    noted = make(tokenizer, tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["quick question"] * 50))
    assert "gigatoken gives other ids for 'q'" in noted.encoder
    assert texts_of(tmp_path / "out", tokenizer) == ["quick question"] * 50


def test_parts_of_a_killed_preparation_are_compared_too(tokenizer, tmp_path, monkeypatch):
    """A part has its name before its ids are compared, and the process may die in between."""
    monkeypatch.setattr("megatron_qwen.data.tokenizers.encoder.PROBES", ())
    monkeypatch.setattr(encoders, "GigatokenEncoder", lying("q", "k"))
    source, documents = tmp_path / "a.jsonl", ["quick question"] * 50
    write_jsonl(source, documents)

    class KilledError(Exception):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("megatron_qwen.data.prepare.job._Proof.of", killed)
        with pytest.raises(KilledError):
            make(tokenizer, tmp_path / "out", source)
    assert list((tmp_path / "out.work").glob("*.bin")), "a part is there"
    noted = make(tokenizer, tmp_path / "out", source)
    assert "gigatoken gives other ids for 'q'" in noted.encoder
    assert texts_of(tmp_path / "out", tokenizer) == documents


def test_added_tokens_are_probed(tokenizer, tmp_path):
    """gigatoken takes a word that stands alone from within others, here only after the sample of the unit."""
    shutil.copytree(tokenizer, tmp_path / "tok")
    library = Tokenizer.from_file(str(tmp_path / "tok/tokenizer.json"))
    library.add_tokens([AddedToken("cat", single_word=True)])
    library.save(str(tmp_path / "tok/tokenizer.json"))
    documents = ["x " * 3000, "concatenate a cat"]
    noted = make(tmp_path / "tok", tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", documents))
    assert "gigatoken gives other ids for" in noted.encoder
    ids = TokenFile(tmp_path / "out").document(1).tolist()
    assert ids[:-1] == library.encode("concatenate a cat", add_special_tokens=False).ids
    assert ids.count(library.token_to_id("cat")) == 1


def test_sentencepiece_falls_back_or_is_equal(corpus, tmp_path):
    arguments = ["--kind", "sentencepiece", "--vocab-size", 600, "--output", tmp_path / "sp", corpus]
    run("tools.data", "tokenizer", "train", *arguments, check=True)
    noted = make(tmp_path / "sp", tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", TEXTS))
    ours = load_tokenizer(tmp_path / "sp")
    file = TokenFile(tmp_path / "out")
    expected = ours.encode_batch(TEXTS)
    assert [file.document(index).tolist()[:-1] for index in range(file.num_documents)] == expected
    assert noted.encoder


def test_the_manifest_says_where_it_comes_from(tokens, corpus):
    noted = read_manifest(tokens)
    assert noted.inputs == [{"path": str(corpus), "size": corpus.stat().st_size}]
    assert noted.control_tokens["<|endoftext|>"] == noted.end_of_text


def test_very_many_small_files(tokenizer, tmp_path):
    """Units of thousands of files: what they are does not travel between processes."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6000):
        (folder / f"{number:05d}_{'x' * 60}.txt").write_text(f"document {number}")
    done = run(
        "tools.data",
        "prepare",
        "--tokenizer",
        tokenizer,
        "--output",
        tmp_path / "out",
        folder,
        timeout_s=120,
        check=True,
    )
    assert "6,000 documents" in done.stdout


def test_a_bad_record_in_the_last_shard_keeps_the_others(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = make(tokenizer, tmp_path / "whole", source)
    good = source.read_text()
    source.write_text(good + "bad\n")
    arguments = [
        "prepare",
        "--tokenizer",
        tokenizer,
        "--output",
        tmp_path / "out",
        "--shard-gib",
        0.00005,
        "--workers",
        1,
    ]
    done = run("tools.data", *arguments, source)
    assert done.returncode == 3
    assert "finished parts are kept" in done.stderr
    made = len(list(tmp_path.glob("out_*.json")))
    assert made > 0
    again = run("tools.data", *arguments, "--on-error", "skip", "--json", source)
    assert again.returncode == 2  # other settings are another preparation
    mended = run("tools.data", *arguments, source)
    assert "exists already" not in mended.stderr
    assert "a.jsonl:" in mended.stderr
    assert len(list(tmp_path.glob("out_*.json"))) == made
    assert whole.documents == len(TEXTS)


def test_a_slow_encoder_stays_chosen(tokenizer, tmp_path, monkeypatch):
    """After a mismatch another attempt does not begin anew once more."""
    monkeypatch.setattr(encoders, "GigatokenEncoder", lying("q", "k"))
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert make(tokenizer, tmp_path / "out", source, task=ShardTask(0, 2), shard_bytes=60_000) is None
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out_*.bin")}
    assert first
    assert make(tokenizer, tmp_path / "out", source, task=ShardTask(0, 2), shard_bytes=60_000) is None
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out_*.bin")} == first


def test_row_groups_of_one_file_fall_into_shards_by_their_size(tokenizer, tmp_path):
    table = pyarrow.table({"text": TEXTS * 4})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    size = (tmp_path / "a.parquet").stat().st_size
    noted = make(tokenizer, tmp_path / "out", tmp_path / "a.parquet", shard_bytes=size // 3)
    assert 3 <= len(noted.shards) <= 6
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS * 4


def test_what_a_kill_left_of_the_work_directory_is_removed(tokenizer, tmp_path):
    """Everything was written, and of the directory only some files were deleted."""
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS[:3])
    made = make(tokenizer, tmp_path / "out", source)
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "task_0_of_1.lock").touch()
    assert make(tokenizer, tmp_path / "out", source) == made
    assert not work.exists()


def test_the_manifest_comes_last(tokenizer, tmp_path, monkeypatch):
    """Where there is a manifest, there are the files that it describes."""
    there = []

    def publish(temporary: Path, path: Path) -> None:
        there.append((path.suffix, (tmp_path / "out.json").exists()))
        files.publish(temporary, path)

    monkeypatch.setattr(join, "publish", publish)
    make(tokenizer, tmp_path / "out", write_jsonl(tmp_path / "texts.jsonl", TEXTS[:3]))
    assert {suffix for suffix, _ in there} >= {".bin", ".idx"}
    assert not any(manifest for _, manifest in there)
    assert (tmp_path / "out.json").exists()
