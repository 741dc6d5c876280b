"""Documents out of parquet files."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_qwen.data.text.blocks import BadRecord, Block, ReadOptions, take
from megatron_qwen.data.text.inputs import InputFile
from megatron_qwen.errors import DataError, Problem

_ROWS = 256


def row_groups(file: InputFile, options: ReadOptions) -> list[int]:
    """Uncompressed bytes of each row group; checks that the needed columns exist.

    Raises:
        DataError: the file is not a parquet file, or lacks a column.
    """
    with _opened(file) as source:
        names = set(source.schema_arrow.names)
        needed = _columns(options)
        if missing := sorted(needed - names):
            fix = f"has no such column; it has {', '.join(sorted(names))}. See --field."
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
        share = file.size / max(source.num_row_groups, 1)
        for group in groups:
            try:
                for batch in source.iter_batches(_ROWS, row_groups=[group], columns=sorted(_columns(options))):
                    yield _block(batch.to_pylist(), f"{file.path}#", row, options)
                    row += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                fix = f"is damaged in row group {group} ({str(error)[:100]}); download it again."
                raise DataError(Problem(str(file.path), None, fix)) from None
            on_read(int(share))


def _opened(file: InputFile) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        fix = f"is not a parquet file, or is truncated ({str(error)[:100]})."
        raise DataError(Problem(str(file.path), None, fix)) from None


def _columns(options: ReadOptions) -> set[str]:
    return {
        options.field,
        *([options.prompt_field] if options.prompt_field is not None else []),
        *(condition.field.partition(".")[0] for condition in options.where),
    }


def _block(rows: list[dict[str, Any]], where: str, first: int, options: ReadOptions) -> Block:
    block = Block(read=len(rows))
    for index, row in enumerate(rows):
        text = row[options.field]
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
