"""Documents out of parquet files."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_qwen.data.chat import pairs
from megatron_qwen.data.chat.forms import FIELDS, FORMS
from megatron_qwen.data.text.blocks import BadRecord, Block, ReadOptions, take, take_chat
from megatron_qwen.data.text.filters import lookup
from megatron_qwen.data.text.formats import InputFile
from megatron_qwen.errors import DataError, Problem

_ROWS = 256
# Thrift's own limits, 100 MB and a million, would call the metadata of a file with very many row groups damaged.
_LARGEST_METADATA = (1 << 31) - 1


def row_groups(file: InputFile, options: ReadOptions) -> list[int]:
    """Uncompressed bytes of each row group; checks that the needed columns exist.

    Raises:
        DataError: the file is not a parquet file, or lacks a column.
    """
    with _opened(file) as source:
        schema = source.schema_arrow
        wanted = pairs.FIELDS[1:3] if options.pairs else FORMS
        if options.chat and not set(wanted) & set(schema.names):
            fix = f"has no conversations: none of its columns is {', '.join(wanted)}."
            raise DataError(Problem(str(file.path), ", ".join(sorted(schema.names)), fix))
        if missing := sorted(name for name in _fields(options) if not _has(schema, name)):
            fix = f"has no such column; it has {', '.join(sorted(schema.names))}. See --field."
            raise DataError([Problem(str(file.path), name, fix) for name in missing])
        return [source.metadata.row_group(index).total_byte_size for index in range(source.num_row_groups)]


def parquet_blocks(
    file: InputFile, start: int, stop: int | None, options: ReadOptions, on_read: Callable[[int], None]
) -> Iterator[Block]:
    """The documents of row groups start .. stop - 1.

    Args:
        file: a parquet file.
        start: first row group.
        stop: end of the row groups; None is all.
        options: how documents are taken.
        on_read: called with bytes read, as far as they are known.
    """
    with _opened(file) as source:
        groups = range(start, source.num_row_groups if stop is None else stop)
        row = sum(source.metadata.row_group(index).num_rows for index in range(start))
        columns = sorted({_column(source.schema_arrow, name) for name in _fields(options)})
        if options.chat:
            read = pairs.FIELDS if options.pairs else FIELDS
            columns = sorted({*columns, *(set(read) & set(source.schema_arrow.names))})
        share = file.size / max(source.num_row_groups, 1)
        for group in groups:
            try:
                for batch in source.iter_batches(_ROWS, row_groups=[group], columns=columns):
                    yield _block(_rows(batch), f"{file.path}#", row, options)
                    row += batch.num_rows
            except pyarrow.ArrowNotImplementedError as error:
                fix = f"uses what pyarrow {pyarrow.__version__} cannot read ({str(error)[:100]}); write it anew."
                raise DataError(Problem(str(file.path), None, fix)) from None
            except (pyarrow.ArrowException, OSError) as error:
                fix = f"is damaged in row group {group} ({str(error)[:100]}); download it again."
                raise DataError(Problem(str(file.path), None, fix)) from None
            on_read(int(share))


def _opened(file: InputFile) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(
            file.path, thrift_string_size_limit=_LARGEST_METADATA, thrift_container_size_limit=_LARGEST_METADATA
        )
    except (pyarrow.ArrowException, OSError) as error:
        fix = f"is not a parquet file, or is truncated ({str(error)[:100]})."
        raise DataError(Problem(str(file.path), None, fix)) from None


def _fields(options: ReadOptions) -> set[str]:
    """The fields that a document is made from; conditions on other fields fail where there is none."""
    return {
        *([] if options.chat else [options.field]),
        *([options.prompt_field] if options.prompt_field is not None else []),
        *(condition.field for condition in options.where),
    }


def _column(schema: pyarrow.Schema, field: str) -> str:
    """The column that holds a field: ``a`` for ``a.b``, unless there is a column of that very name."""
    return field if field in schema.names else field.partition(".")[0]


def _has(schema: pyarrow.Schema, field: str) -> bool:
    if field in schema.names:
        return True
    first, *rest = field.split(".")
    if first not in schema.names:
        return False
    kind = schema.field(first).type
    for name in rest:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return False
        kind = kind.field(name).type
    return True


def _rows(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of a batch; of a row that cannot be given, why."""
    for index, column in enumerate(batch.schema):
        if pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":  # Python's times have microseconds
            batch = batch.set_column(
                index, column.name, batch.column(index).cast(pyarrow.timestamp("us", column.type.tz), safe=False)
            )
    try:
        found: list[dict[str, Any] | str] = batch.to_pylist()
        return found
    except ValueError:
        return [_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row(one: Any) -> dict[str, Any] | str:
    try:
        (row,) = one.to_pylist()
    except UnicodeDecodeError:
        return "is not UTF-8 text."
    except ValueError as error:
        return f"cannot be read ({str(error)[:100]})."
    found: dict[str, Any] = row
    return found


def _block(rows: list[dict[str, Any] | str], where: str, first: int, options: ReadOptions) -> Block:
    block = Block(read=len(rows))
    for index, row in enumerate(rows):
        if isinstance(row, str):
            block.bad.append(BadRecord(f"{where}{first + index}", None, row))
            continue
        if options.chat:
            block.bytes += len(str(row))
            take_chat(block, _without_null(row), options, partial(_bad_row, f"{where}{first + index}"))
            continue
        text = lookup(row, options.field)
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError:
                block.bad.append(BadRecord(f"{where}{first + index}", None, "is not UTF-8 text."))
                continue
        if isinstance(text, str):
            block.bytes += len(text)
            if len(text) > options.max_document_bytes:
                fix = f"is longer than {options.max_document_bytes >> 20} MiB; split it, or raise --max-document-mib."
                block.bad.append(BadRecord(f"{where}{first + index}", None, fix))
                continue
        if (fix_text := take(block, row, text, options)) is not None:
            block.bad.append(BadRecord(f"{where}{first + index}", None, fix_text))
    return block


def _bad_row(where: str, fix: str, reason: str) -> BadRecord:
    return BadRecord(where, None, fix, reason=reason)


def _without_null(value: Any) -> Any:
    """A value without the fields that are null: the objects of a column all have the fields of any of them."""
    if isinstance(value, dict):
        return {name: _without_null(one) for name, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value
