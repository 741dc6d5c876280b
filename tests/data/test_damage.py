"""Damaged token files and malformed text: one message, exit 3, never a crash and never a read out of range."""

import gzip
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import zstandard

from megatron_qwen.config.blend import SourceSpec
from megatron_qwen.data.reading.samples import ReadingOptions, window
from megatron_qwen.data.reading.sources import open_model_source
from megatron_qwen.data.token_files.manifest import manifest_path
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.data.token_files.verify import verify
from megatron_qwen.errors import DataError
from tests.conftest import run
from tests.tiers import count

MUTATIONS = count(quick=100, thorough=500)


def mutate(random: random.Random, content: bytes) -> bytes:
    """One way in which a file goes wrong."""
    how = random.choice(["flip", "cut", "grow", "zero", "field", "swap"])
    data = bytearray(content)
    at = random.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << random.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "grow":
        data += random.randbytes(random.randrange(1, 100))
    elif how == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif how == "field":
        where = random.randrange(0, len(data) // 8) * 8 + 2
        value = random.choice([0, 1, 2**31 - 1, 2**32, 2**62, 2**63, 2**64 - 1])
        data[where : where + 8] = struct.pack("<Q", value)[: max(len(data) - where, 0)]
    else:
        other = random.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    return bytes(data)


def test_mutations(tokens, tmp_path):
    """Whatever is read of such a file is inside it; the full check finds every change."""
    generator = random.Random(5)
    original = {ending: Path(f"{tokens}{ending}").read_bytes() for ending in (".idx", ".bin", ".json")}
    prefix = tmp_path / "a"
    refused = opened = 0
    messages: list[str] = []
    for _ in range(MUTATIONS):
        ending = generator.choice([".idx", ".idx", ".bin"])
        changed = mutate(generator, original[ending])
        for name, content in original.items():
            (tmp_path / f"a{name}").write_bytes(changed if name == ending else content)
        if changed == original[ending]:
            continue
        try:
            file = TokenFile(prefix)
            for document in (0, file.num_documents // 2, file.num_documents - 1):
                file.document(document)
            file.document_ends(0, min(1000, file.num_tokens))
            source = open_model_source("a", SourceSpec(path=str(prefix)), fraction=0.1)
            reading = ReadingOptions(True, True, vocab_size=320)
            for start in (0, source.stop // 2, max(source.stop - 64, 0)) if source.stop > 1 else ():
                window(
                    source.tokens, [(start, start + min(64, source.stop - start))], stop=source.stop, reading=reading
                )
            opened += 1
        except DataError as error:
            refused += 1
            messages.append(str(error))
        with pytest.raises(DataError, match=str(tmp_path)):
            verify(prefix)
    print(f"{refused} refused when opened, {opened} found by the full check only")
    assert all(str(tmp_path) in message for message in messages)
    assert refused > MUTATIONS // 10
    assert opened > MUTATIONS // 10


TORN = gzip.compress(random.Random(0).randbytes(5000).hex().encode(), mtime=0)[:2000]
LONG = '{"text": "' + "x" * (3 << 20) + '"}\n'


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("utf8.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "utf8.jsonl:2"),
        ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), "utf16.jsonl:1"),
        ("nul.jsonl", b'{"text": "a"}\n\0\0\0\n', "nul.jsonl:2"),
        ("nul_inside.jsonl", b'{"text": "a\0b"}\n', "nul_inside.jsonl:1"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "b', "half.jsonl:2"),
        ("wrong.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "wrong.jsonl:2"),
        ("list.jsonl", b"[1, 2]\n", "list.jsonl:1"),
        ("nan.jsonl", b'{"text": NaN}\n', "nan.jsonl:1"),
        ("half_pair.jsonl", b'{"text": "\\ud800"}\n', "half_pair.jsonl:1"),
        ("latin.txt", b"caf\xe9", "latin.txt"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("blank.jsonl", b"\n\n  \n", "has no text"),
        ("hollow.jsonl", b'{"text": ""}\n', "has no text"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 1000, mtime=0)[:-9], "cut.jsonl.gz"),
        (
            "torn.jsonl.gz",
            gzip.compress(random.Random(0).randbytes(5000).hex().encode(), mtime=0)[:2000],
            "torn.jsonl.gz",
        ),
        ("no.jsonl.gz", b"this is not gzip", "no.jsonl.gz"),
        ("cut.jsonl.zst", zstandard.compress(b'{"text": "abc"}\n' * 1000)[:-3], "cut.jsonl.zst"),
        ("no.jsonl.zst", b"this is not zstandard", "no.jsonl.zst"),
        ("no.parquet", b"PAR1 this is not parquet", "no.parquet"),
        ("long.jsonl", b'{"text": "a"}\n' + LONG.encode() + b'{"text": "b"}\n', "long.jsonl:2"),
        ("table.csv", b"a,b\n", ".csv"),
    ],
)
def test_malformed_text(name, content, named, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    arguments = ["--tokenizer", tokenizer, "--output", tmp_path / "out" / "tokens", "--max-document-mib", 2]
    done = run("tools.data", "prepare", *arguments, tmp_path / name)
    assert done.returncode == 3, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n'),
        ("crlf.jsonl", b'{"text": "a"}\r\n{"text": "b"}\r\n'),
        ("noend.jsonl", b'{"text": "a"}\n{"text": "b"}'),
        ("blank.jsonl", b'\n{"text": "a"}\n\n\n{"text": "b"}\n\n'),
    ],
)
def test_unusual_but_right(name, content, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    arguments = ["--tokenizer", tokenizer, "--output", tmp_path / "tokens"]
    run("tools.data", "prepare", *arguments, tmp_path / name, check=True)
    file = TokenFile(tmp_path / "tokens")
    assert [len(file.document(index)) for index in range(file.num_documents)] == [2, 2]


def test_a_line_of_a_gibibyte_is_refused_in_little_memory(tokenizer, tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.seek(1 << 30, 1)
        file.write(b'"}\n{"text": "b"}\n')
    arguments = ["--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 1, "--max-document-mib", 64]
    done = run("tools.data", "prepare", *arguments, tmp_path / "a.jsonl")
    assert done.returncode == 3
    assert "a.jsonl:2: is longer than 64 MiB" in done.stderr
    done = run("tools.data", "prepare", *arguments, "--on-error", "skip", "--json", tmp_path / "a.jsonl", check=True)
    assert [json.loads(done.stdout)[name] for name in ("read", "documents", "skipped")] == [3, 2, 1]


def test_a_parquet_file_without_the_column(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    done = run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", tmp_path / "a.parquet")
    assert done.returncode == 3
    assert "text: has no such column; it has body" in done.stderr.replace(" = ", ": ")


def test_all_wrong_files_at_once(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "list").write_text("nowhere.jsonl\n")
    names = [
        "missing.jsonl",
        tmp_path / "empty.txt",
        tmp_path / "folder",
        "none*.jsonl",
        f"@{tmp_path / 'list'}",
        "@no",
    ]
    done = run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", *names)
    assert done.returncode == 3
    assert "6 problems" in done.stderr


def test_a_set_that_lacks_a_shard(tokenizer, corpus, tmp_path):
    arguments = ["--tokenizer", tokenizer, "--output", tmp_path / "out", "--shard-gib", 0.0001]
    run("tools.data", "prepare", *arguments, corpus, check=True)
    shards = json.loads(manifest_path(tmp_path / "out").read_text())["shards"]
    (tmp_path / f"{shards[1]}.bin").unlink()
    shutil.copyfile(tmp_path / f"{shards[0]}.bin", tmp_path / f"{shards[2]}.bin")
    done = run("tools.data", "verify", tmp_path / "out")
    assert done.returncode == 3
    assert f"{shards[1]}.bin" in done.stderr
    assert f"{shards[2]}.bin" in done.stderr
