"""Parquet files: fields inside structs, nulls, kinds of text columns."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.filters import parse_conditions
from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.text.parquet import parquet_blocks, row_groups
from megatron_qwen.errors import DataError

ROWS = [
    {"text": "a", "meta": {"body": {"text": "one"}, "lang": "en"}},
    {"text": None, "meta": {"body": {"text": None}, "lang": "en"}},
    {"text": "c", "meta": None},
    {"text": "d", "meta": {"body": {"text": "four"}, "lang": "de"}},
]


def texts(path: Path, **options: Any) -> list[object]:
    (file,) = find_inputs([path]).files
    read = ReadOptions(**options)
    assert row_groups(file, read)
    blocks = list(parquet_blocks(file, 0, None, read, lambda _: None))
    assert sum(block.read for block in blocks) == len(ROWS)
    assert not [bad for block in blocks for bad in block.bad]
    return [text for block in blocks for text in block.texts]


@pytest.fixture
def path(tmp_path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet", row_group_size=3)
    return tmp_path / "x.parquet"


def test_a_field_inside_a_struct(path):
    assert texts(path, field="meta.body.text") == ["one", "four"]
    assert texts(path) == ["a", "c", "d"]


def test_a_condition_inside_a_struct(path):
    assert texts(path, where=parse_conditions(["meta.lang=en"])) == ["a"]


def test_a_column_whose_name_has_a_dot(tmp_path):
    table = pyarrow.table({"meta.text": ["x"] * len(ROWS)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet", field="meta.text") == ["x"] * len(ROWS)


@pytest.mark.parametrize("field", ["meta.body.txt", "meta.lang.text", "other.text"])
def test_a_field_that_no_row_can_have_is_refused(path, field):
    with pytest.raises(DataError, match="has no such column; it has meta, text"):
        texts(path, field=field)


def test_large_strings_dictionaries_and_bytes_are_text(tmp_path):
    kinds = [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.binary()]
    for kind in kinds:
        values = [b"x"] * len(ROWS) if kind == pyarrow.binary() else ["x"] * len(ROWS)
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), tmp_path / "x.parquet")
        assert texts(tmp_path / "x.parquet") == ["x"] * len(ROWS), kind


def test_a_text_that_is_not_utf_8_is_a_bad_record(tmp_path):
    """A string column may hold any bytes: its writer did not look."""
    values = pyarrow.array([b"a", b"\xff\xfe", "\u00e9".encode(), None], pyarrow.binary())
    unchecked = pyarrow.StringArray.from_buffers(4, *values.buffers()[1:], values.buffers()[0])
    pyarrow.parquet.write_table(pyarrow.table({"text": unchecked}), tmp_path / "x.parquet")
    (file,) = find_inputs([tmp_path / "x.parquet"]).files
    (block,) = parquet_blocks(file, 0, None, ReadOptions(), lambda _: None)
    assert block.texts == ["a", "\u00e9"]
    assert [(bad.where.rpartition("#")[2], bad.fix) for bad in block.bad] == [("1", "is not UTF-8 text.")]
    assert (block.read, block.empty) == (4, 1)


def test_conditions_on_times_and_decimal_numbers(tmp_path):
    import datetime
    from decimal import Decimal

    times = pyarrow.array([1, 10**9 + 1, None, 5], pyarrow.timestamp("ns"))
    scores = pyarrow.array([Decimal("1.50"), Decimal("0.25"), None, Decimal("2.00")])
    table = pyarrow.table({"text": list("abcd"), "t": times, "score": scores})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    path = tmp_path / "x.parquet"
    assert texts(path, where=parse_conditions(["score>=1"])) == ["a", "d"]
    assert texts(path, where=parse_conditions(["score=0.25"])) == ["b"]
    second = str(datetime.datetime(1970, 1, 1, 0, 0, 1))
    assert texts(path, where=parse_conditions([f"t={second}"])) == ["b"]
    assert texts(path, where=parse_conditions(["t!=1"])) == ["a", "b", "d"]
