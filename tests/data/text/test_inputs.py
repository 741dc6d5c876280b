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
        ".part-00001.jsonl.crc": "hidden",
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
    # Whatever byte is the last of those that were read at once.
    put(tmp_path / "commas.json", b'{"text": "' + b"," * 200_000 + b'"}\n')
    put(tmp_path / "braces.json.gz", gzip.compress(b'\n{"text": "' + b"{[" * 200_000 + b'"}'))
    assert read(tmp_path) == ["bom.json", "braces.json.gz", "commas.json", "long.json"]
    put(tmp_path / "infos.json", b'{"features": {"a": "' + b"x" * 200_000 + b'"}}')
    assert left_out(tmp_path) == {"infos.json": "no field 'text' in its first record"}


def test_a_field_with_a_dot_is_found_as_it_is_when_read(tmp_path):
    put(tmp_path / "flat.json", b'{"meta.text": "one"}\n')
    put(tmp_path / "nested.json", b'{"meta": {"text": "one"}}\n')
    put(tmp_path / "about.json", b'{"meta": {"id": 1}}\n')
    put(tmp_path / "null.json", b'{"meta": null}\n')
    assert read(tmp_path, text_field="meta.text") == ["flat.json", "nested.json", "null.json"]


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


@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*", "cach*", "cach*/**/*.jsonl"])
def test_a_folder_whose_links_lead_into_a_store(pattern, tmp_path):
    """As a hub cache (blobs without endings) and git-annex (a hidden folder) lay files out."""
    cache = tmp_path / "caches"
    put(cache / "blobs/0a1b", LINE)
    (cache / "snapshots/main").mkdir(parents=True)
    (cache / "snapshots/main/train.jsonl").symlink_to("../../blobs/0a1b")
    put(cache / "own.jsonl")
    put(cache / ".store/x/y/d.jsonl")
    put(cache / ".store/e.jsonl")
    (cache / "also").symlink_to(".store/x/y")
    (cache / "e.jsonl").symlink_to(".store/e.jsonl")
    name = tmp_path / pattern if pattern else tmp_path
    assert sorted(read(name)) == ["d.jsonl", "e.jsonl", "own.jsonl", "train.jsonl"]
    if pattern in ("", "*", "cach*"):
        assert sorted(map(str, ((item.path.relative_to(cache)) for item in find_inputs([name]).left_out))) == [
            ".store/e.jsonl",
            ".store/x/y/d.jsonl",
            "blobs/0a1b",
        ]


def test_the_link_is_left_out_not_the_folder(tmp_path):
    put(tmp_path / "z/real.jsonl")
    (tmp_path / "a").symlink_to("z")
    found = find_inputs([tmp_path])
    assert [file.path for file in found.files] == [tmp_path / "z/real.jsonl"]
    assert [(item.path, item.why) for item in found.left_out] == [
        (tmp_path / "a", "link to a folder that is read as well")
    ]


def test_what_is_hidden_stops_nothing(tmp_path):
    put(tmp_path / "d.jsonl")
    (tmp_path / ".#d.jsonl").symlink_to("user@host.1234")  # an editor's lock
    put(tmp_path / ".trash/old.jsonl")
    (tmp_path / ".trash/gone.jsonl").symlink_to("nowhere")
    (tmp_path / ".linked").symlink_to(".trash")
    assert read(tmp_path) == ["d.jsonl"]
    assert left_out(tmp_path) == dict.fromkeys((".#d.jsonl", "old.jsonl", "gone.jsonl", ".linked"), "hidden")


def test_a_link_is_left_out_once(tmp_path):
    put(tmp_path / "a/b/x.jsonl")
    (tmp_path / "a/b/note").symlink_to("nowhere")
    (tmp_path / "a/b/y.jsonl").symlink_to("x.jsonl")
    for pattern in ("**", "**/*", "*"):
        found = find_inputs([tmp_path / pattern])
        assert sorted((item.path.name, item.why.split(" /")[0]) for item in found.left_out) == [
            ("note", "link to nothing"),
            ("y.jsonl", "the same file as"),
        ], pattern


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
    assert read(tmp_path / "a/**.jsonl") == ["x.jsonl"], "only a whole ** means any folders"


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
    odd = put(tmp_path / "a\u0085b.jsonl")
    assert read(f"@{put(tmp_path / 'odd', str(odd).encode())}") == [odd.name]


def test_what_cannot_be_a_name_is_said_in_short(tmp_path):
    assert f"without the @ it is read: {tmp_path}/a.jsonl" in refusal(f"@{put(tmp_path / 'a.jsonl')}")
    long = put(tmp_path / "list", b'{"text": "' + b"x" * 5_000 + b'"}\n')
    assert "cannot be the name of a file (File name too long)" in refusal(f"@{long}")
    assert len(refusal(f"@{long}")) < 300


def test_a_pipe_is_told_from_a_file_that_is_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a pipe" in refusal(tmp_path / "pipe.jsonl")
    put(tmp_path / "a.jsonl")
    assert left_out(tmp_path) == {"pipe.jsonl": "no regular file"}


def test_all_errors_at_once(tmp_path):
    told = refusal(tmp_path / "no.jsonl", tmp_path / "*.jsonl", put(tmp_path / "t.csv"), f"@{tmp_path}/none")
    for name in ("no.jsonl", "*.jsonl", "t.csv", "@"):
        assert name in told
