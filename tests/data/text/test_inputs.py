"""Folders, patterns and lists mean what their users think: what is read, what is left out, what is refused."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
import zstandard

from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.errors import DataError

LINE = b'{"text": "one"}\n'


def put(path: Path, content: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(*names: object, **more: str) -> list[str]:
    """Names of the files that are read."""
    return [file.path.name for file in find_inputs([str(name) for name in names], **more).files]


def left_out(*names: object) -> dict[str, str]:
    return {item.path.name: item.why for item in find_inputs([str(name) for name in names]).left_out}


def refusal(*names: object, **more: str) -> str:
    with pytest.raises(DataError) as raised:
        find_inputs([str(name) for name in names], **more)
    return str(raised.value)


ENDINGS = [
    *("a.jsonl", "a.JSONL", "a.ndjson", "a.json", "c4-train.00000-of-01024.json.gz", "a.jsonl.zst", "a.jsonl.zstd"),
    *("a.ndjson.bz2", "a.json.xz", "a.txt", "a.txt.gzip"),
]


@pytest.mark.parametrize("name", ENDINGS)
def test_reads_under_every_name_that_corpora_are_published_under(name, tmp_path):
    pack = {".gz": gzip.compress, ".gzip": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    pack |= {".zst": zstandard.compress, ".zstd": zstandard.compress}
    put(tmp_path / name, pack.get(Path(name).suffix, bytes)(LINE))
    assert read(tmp_path / name) == read(tmp_path) == read(tmp_path / "*") == [name]


def test_names_every_file_of_a_folder_that_it_does_not_read(tmp_path):
    put(tmp_path / "a.jsonl")
    others = {
        "table.csv": "unknown ending .csv",
        "b.jsonl.lz4": "unknown ending .lz4",
        "c.jsonl.tmp": "unknown ending .tmp",
        "d.parquet.gz": "unknown ending .gz",
        "e.tar.gz": "unknown ending .gz",
        "part-00000": "no ending",
        ".part-00001.jsonl.crc": "unknown ending .crc",
        "._a.jsonl": "hidden",
        "README.txt": "about the data, by its name",
        "license.txt": "about the data, by its name",
        "out.skipped.jsonl": "rejected records of an earlier preparation",
        "empty.jsonl": "is empty",
    }
    for name in others:
        put(tmp_path / name, b"" if name == "empty.jsonl" else LINE)
    put(tmp_path / ".ipynb_checkpoints" / "f.jsonl")
    assert read(tmp_path) == ["a.jsonl"]
    assert left_out(tmp_path) == {**others, "f.jsonl": "hidden"}


def test_says_the_counts_the_reasons_and_some_names(tmp_path):
    put(tmp_path / "a.jsonl")
    for index in range(7):
        put(tmp_path / f"t{index}.csv")
    put(tmp_path / "x.html")
    csv, html = str(find_inputs([str(tmp_path)])).splitlines()
    assert csv.startswith(f"not read: 7 files (unknown ending .csv): {tmp_path}/t0.csv, ")
    assert csv.endswith(f"{tmp_path}/t4.csv, ...")
    assert html == f"not read: 1 file (unknown ending .html): {tmp_path}/x.html"


def test_everything_that_names_no_data_is_refused_with_what_lies_there(tmp_path):
    put(tmp_path / "t.csv")
    assert "unknown ending .csv" in refusal(tmp_path)
    assert "unknown ending .csv" in refusal(tmp_path / "*")
    assert ".jsonl" in refusal(tmp_path / "t.csv"), "the endings that can be read"
    (tmp_path / "empty").mkdir()
    assert "contains no file" in refusal(tmp_path / "empty")


def test_metadata_beside_data_is_not_data(tmp_path):
    """A folder of datasets.save_to_disk, or one that a download left."""
    put(tmp_path / "train.json")
    put(tmp_path / "dataset_info.json", json.dumps({"description": "x", "features": {}}, indent=2).encode())
    put(tmp_path / "state.json", b'{"_fingerprint": "1"}\n')
    put(tmp_path / "list.json", b'[{"text": "one"}]')
    assert read(tmp_path) == ["train.json"]
    assert {name: why.split(";")[0] for name, why in left_out(tmp_path).items()} == {
        "dataset_info.json": "is one JSON value over several lines, not JSON lines",
        "state.json": "no field 'text' in its first record",
        "list.json": "is one JSON array, not JSON lines",
    }
    assert read(tmp_path, text_field="_fingerprint") == ["state.json"]
    assert "jq -c '.[]'" in refusal(tmp_path / "list.json")
    assert "several lines" in refusal(tmp_path / "dataset_info.json")
    assert read(tmp_path / "state.json") == ["state.json"], "named itself: its records will say what they lack"


def test_a_record_longer_than_the_first_bytes_is_a_record(tmp_path):
    put(tmp_path / "long.json", b'{"text": "' + b"x" * 200_000 + b'"}\n')
    put(tmp_path / "bom.json", b"\xef\xbb\xbf" + LINE)
    assert read(tmp_path) == ["bom.json", "long.json"]


def test_follows_links_once(tmp_path):
    put(tmp_path / "elsewhere/deep/r.jsonl")
    folder = tmp_path / "folder"
    put(folder / "own.jsonl")
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "same").symlink_to("../elsewhere")
    (folder / "file.jsonl").symlink_to("../elsewhere/deep/r.jsonl")
    (folder / "circle").symlink_to(".")
    for name in (folder, folder / "**/*.jsonl", folder / "*"):
        assert sorted(read(name)) in (["file.jsonl", "own.jsonl"], ["own.jsonl", "r.jsonl"]), name
    assert left_out(folder)["circle"] == left_out(folder)["same"] == "link to a folder that is read as well"
    assert "the same file as" in left_out(folder)["r.jsonl"]


def test_a_link_to_nothing_is_not_absent(tmp_path):
    put(tmp_path / "own.jsonl")
    (tmp_path / "note").symlink_to("nowhere")
    assert left_out(tmp_path) == {"note": "link to nothing"}
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    for name in (tmp_path, tmp_path / "*.jsonl", tmp_path / "gone.jsonl"):
        assert "gone.jsonl" in refusal(name)
        assert "link to nothing" in refusal(name)


def test_a_file_is_used_once_whatever_it_is_called_by(tmp_path):
    put(tmp_path / "a/x.jsonl")
    (tmp_path / "link.jsonl").symlink_to("a/x.jsonl")
    for names in (
        [tmp_path / "a/x.jsonl", tmp_path / "a/../a/x.jsonl"],
        [tmp_path / "a", tmp_path / "a/x.jsonl"],
        [tmp_path / "a/*.jsonl", tmp_path / "link.jsonl"],
    ):
        assert "named twice" in refusal(*names)


def test_patterns_as_in_a_shell(tmp_path):
    put(tmp_path / "a/x.jsonl")
    put(tmp_path / "a/.hidden.jsonl")
    put(tmp_path / "b/c/y.jsonl")
    assert read(tmp_path / "*/*.jsonl") == ["x.jsonl"]
    assert read(tmp_path / "**/*.jsonl") == ["x.jsonl", "y.jsonl"]
    assert read(tmp_path / "[ab]") == ["x.jsonl", "y.jsonl"], "folders that match are read as folders"
    assert read(tmp_path / "a/.*.jsonl") == [".hidden.jsonl"]
    put(tmp_path / "a[1].jsonl")
    assert read(tmp_path / "a[1].jsonl") == ["a[1].jsonl"], "a name that exists is no pattern"


def test_relative_patterns(tmp_path, monkeypatch):
    put(tmp_path / "a/x.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [file.path for file in find_inputs(["**/*.jsonl"]).files] == [Path("a/x.jsonl")]
    monkeypatch.chdir(tmp_path / "a")
    assert [file.path for file in find_inputs(["../*/*.jsonl"]).files] == [Path("../a/x.jsonl")]


def test_lists(tmp_path):
    put(tmp_path / "a.jsonl")
    put(tmp_path / "b b.jsonl")
    names = put(tmp_path / "list", f"\ufeff# all\r\n{tmp_path}/a.jsonl\r\n\r\n{tmp_path}/b b.jsonl\r\n".encode())
    assert read(f"@{names}") == ["a.jsonl", "b b.jsonl"]
    assert "names nothing" in refusal(f"@{put(tmp_path / 'none', b'# nothing')}")
    assert "another list" in refusal(f"@{put(tmp_path / 'nested', b'@list')}")
    assert "cannot be read" in refusal(f"@{tmp_path}/missing")


def test_a_pipe_is_told_from_a_file_that_is_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a pipe" in refusal(tmp_path / "pipe.jsonl")
    put(tmp_path / "a.jsonl")
    assert left_out(tmp_path) == {"pipe.jsonl": "no regular file"}


def test_all_errors_at_once(tmp_path):
    told = refusal(tmp_path / "no.jsonl", tmp_path / "*.jsonl", put(tmp_path / "t.csv"), f"@{tmp_path}/none")
    for name in ("no.jsonl", "*.jsonl", "t.csv", "@"):
        assert name in told
