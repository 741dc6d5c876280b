"""A file that is read in parts gives every record once, wherever it is cut."""

import json

from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.text.records import FileSpan, read_span


def texts(*spans: FileSpan) -> list[object]:
    return [text for span in spans for block in read_span(span, ReadOptions()) for text in block.texts]


def test_two_spans_share_no_line_and_lose_none(tmp_path):
    """Cut at every byte: at the begin of a line, in it, and at its end."""
    wanted = ["one", "", "three", "äöü", "five"]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    (file,) = find_inputs([path])
    whole = texts(FileSpan(file))
    assert [text for text in whole if text] == [text for text in wanted if text]
    for cut in range(1, file.size):
        assert texts(FileSpan(file, 0, cut), FileSpan(file, cut)) == whole, cut
