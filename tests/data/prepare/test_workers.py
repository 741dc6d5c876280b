"""What becomes of a worker's error, and of a damaged part that an earlier attempt left."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from megatron_qwen.data.prepare import job
from megatron_qwen.data.token_files.verify import verify
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import DataError
from tests.data.prepare.test_prepare import TEXTS, make, write_jsonl


def test_a_bad_record_is_reported_however_late_the_worker_is_heard(tokenizer, tmp_path, monkeypatch):
    """The worker has ended before the parent reads its first part and sends it more."""

    def load_late(directory, **options):
        deadline = time.monotonic() + 60
        while multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.01)
        return load_tokenizer(directory, **options)

    monkeypatch.setattr(job, "load_tokenizer", load_late)
    short = [text[at : at + 500] for text in TEXTS for at in range(0, 20_000, 500)]
    lines = write_jsonl(tmp_path / "good.jsonl", [text for text in short if text]).read_text().splitlines()
    size, first = 0, 0
    while size < 25_000:  # in the second of at least five units of 20,000 bytes
        size, first = size + len(lines[first]) + 1, first + 1
    assert sum(map(len, lines)) > 100_000
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join([*lines[:first], "bad", *lines[first:]]) + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:{first + 1}"):
        make(tokenizer, tmp_path / "out", source, workers=1)


@pytest.mark.parametrize("ending", ["bin", "len", "mask"])
def test_a_damaged_part_of_an_earlier_attempt_is_made_again(ending, tokenizer, tmp_path):
    rows = [json.dumps({"prompt": text[:50], "text": text[50:]}) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(rows[:-1]))
    last = tmp_path / "b.jsonl"
    last.write_text("bad\n")

    def prepare(name: str):
        return make(tokenizer, tmp_path / name, tmp_path / "a.jsonl", last, prompt_field="prompt", workers=1)

    with pytest.raises(DataError, match=r"b\.jsonl"):
        prepare("out")
    last.write_text(rows[-1])
    parts = [path for path in tmp_path.rglob(f"*.{ending}") if path.with_suffix(".json").is_file()]
    part = max(parts, key=lambda path: path.stat().st_size)  # one may hold no document
    _damage(part)
    with pytest.raises(DataError, match=rf"{part.name}.*did not match its checksum"):
        prepare("out")
    made, whole = prepare("out"), prepare("whole")
    assert (made.bin_xxh3_128, made.idx_xxh3_128) == (whole.bin_xxh3_128, whole.idx_xxh3_128)
    assert made.mask_xxh3_128 == whole.mask_xxh3_128 is not None
    assert verify(tmp_path / "out") == made


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
