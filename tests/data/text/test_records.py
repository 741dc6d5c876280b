"""A file that is read in parts gives every record once, wherever it is cut."""

import json
from pathlib import Path

from megatron_qwen.data.text.blocks import Block, ReadOptions
from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.text.records import FileSpan, read_span


def texts(*spans: FileSpan) -> list[object]:
    return [text for span in spans for block in read_span(span, ReadOptions()) for text in block.texts]


def test_two_spans_share_no_line_and_lose_none(tmp_path):
    """Cut at every byte: at the begin of a line, in it, and at its end."""
    wanted = ["one", "", "three", "äöü", "five"]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    (file,) = find_inputs([path]).files
    whole = texts(FileSpan(file))
    assert [text for text in whole if text] == [text for text in wanted if text]
    for cut in range(1, file.size):
        assert texts(FileSpan(file, 0, cut), FileSpan(file, cut)) == whole, cut


def all_of(path: Path, content: bytes, **options: str) -> Block:
    """The blocks of a file as one."""
    path.write_bytes(content)
    (file,) = find_inputs([path]).files
    whole = Block()
    for block in read_span(FileSpan(file), ReadOptions(**options)):
        whole.texts += block.texts
        whole.bad += block.bad
        whole.read, whole.empty = whole.read + block.read, whole.empty + block.empty
    return whole


def test_null_is_an_empty_text_and_a_missing_field_is_an_error(tmp_path):
    block = all_of(tmp_path / "a.jsonl", b'{"text": null}\n{"text": ""}\n{"txt": "x"}\n{"text": "a"}\n')
    assert (block.texts, block.empty, block.read) == (["a"], 2, 4)
    assert [bad.where for bad in block.bad] == [f"{tmp_path}/a.jsonl:3"]


def test_null_inside_an_object(tmp_path):
    content = b'{"a": {"b": null}}\n{"a": null}\n{"a": {}}\n{"a": 1}\n{"a": {"b": "x"}}\n'
    block = all_of(tmp_path / "a.jsonl", content, field="a.b")
    assert (block.texts, block.empty, len(block.bad)) == (["x"], 2, 2)


def test_what_json_does_not_allow_matters_only_in_the_text(tmp_path):
    content = (
        b'{"text": "a", "score": NaN}\n{"text": "b", "score": -Infinity, "who": "\\ud800"}\n'
        b'{"text": NaN}\n{"text": "\\ud800"}\n{"text": "c\\ud83d\\ude00"}\n'
    )
    block = all_of(tmp_path / "a.jsonl", content)
    assert block.texts == ["a", "b", "c\N{GRINNING FACE}"]
    assert [bad.where.split(":")[1] for bad in block.bad] == ["3", "4"]
    assert "surrogate" in block.bad[1].fix
