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
