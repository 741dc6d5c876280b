"""Token files are Megatron's, read without reading them whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_qwen.data.token_files.token_file import TokenFile, TokenFileWriter
from megatron_qwen.errors import DataError

DOCUMENTS = [[5, 6, 7], [1], [2, 3], [9, 9, 9, 9]]


def write(prefix: Path, vocab_size: int = 1000) -> TokenFile:
    with TokenFileWriter(prefix, vocab_size=vocab_size) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    return TokenFile(prefix)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (65536, np.uint16), (65537, np.int32)])
def test_reads_what_was_written(vocab_size, dtype, tmp_path):
    file = write(tmp_path / "a", vocab_size)
    assert file.dtype == dtype
    assert (file.num_documents, file.num_tokens) == (4, 10)
    assert [file.document(index).tolist() for index in range(4)] == DOCUMENTS
    assert file.tokens(2, 6).tolist() == [7, 1, 2, 3]


def read_with_megatron(prefix: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return [dataset[index].tolist() for index in range(len(dataset))]


def write_with_megatron(prefix: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder: Any = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    import torch

    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(prefix + ".idx")


def test_megatron_reads_ours_and_we_read_megatrons(pool, tmp_path):
    write(tmp_path / "ours")
    assert pool[1].run(read_with_megatron, str(tmp_path / "ours"))[0] == DOCUMENTS
    pool[1].run(write_with_megatron, str(tmp_path / "theirs"))
    theirs = TokenFile(tmp_path / "theirs")
    assert [theirs.document(index).tolist() for index in range(4)] == DOCUMENTS


def test_document_ends(tmp_path):
    file = write(tmp_path / "a")
    ends = [2, 3, 5, 9]
    for start in range(10):
        for stop in range(start + 1, 11):
            assert file.document_ends(start, stop).tolist() == [end for end in ends if start <= end < stop], (
                start,
                stop,
            )


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OverflowError), TokenFileWriter(tmp_path / "a", vocab_size=1000) as writer:
        writer.add([70_000])
    assert list(tmp_path.iterdir()) == []


def test_no_documents(tmp_path):
    with TokenFileWriter(tmp_path / "a", vocab_size=10):
        pass
    with pytest.raises(DataError, match="holds no tokens"):
        TokenFile(tmp_path / "a")
