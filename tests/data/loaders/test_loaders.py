"""The memory-map loader and DALI give the same batches; what goes wrong in reading ahead is said."""

import hashlib

import pytest
import torch

from megatron_qwen.config.sections import DataConfig
from megatron_qwen.data.loaders.batches import BatchRequest, BatchSlice
from megatron_qwen.data.loaders.dali_loader import DaliLoader
from megatron_qwen.data.loaders.read_ahead import MemoryMapLoader
from megatron_qwen.errors import DataError
from tests.data.blends import open_run, write_source

CPU = torch.device("cpu")
FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def stages(folder, seq_length=32):
    return {
        "sources": {name: {"path": str(folder / name)} for name in "ab"},
        "stages": [
            {"name": "one", "tokens": 2000 * seq_length, "weights": {"a": 0.3, "b": 0.7}, "seq_length": seq_length},
            {"name": "two", "weights": {"b": 1}, "seq_length": 2 * seq_length, "lengths": {seq_length: 0.5, 8: 0.5}},
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sources")
    for name, total in (("a", 4000), ("b", 3500)):
        write_source(path / name, total)
    return path


def hashes(loader, data, steps: int, micro: int = 2) -> list[str]:
    """Of every batch of a rank, over steps of four samples."""
    found = []

    def request(number: int) -> tuple:
        return data.at(4 * number), BatchRequest(4 * number, 4, micro)

    for step in range(steps):
        batches = loader.load(*request(step), lambda step=step: (request(later) for later in range(step + 1, steps)))
        for batch in batches:
            digest = hashlib.sha256()
            for field in FIELDS:
                tensor = getattr(batch, field)
                digest.update(f"{field} {tensor.dtype} {tuple(tensor.shape)} {batch.seq_lengths}".encode())
                digest.update(tensor.numpy().tobytes())
            found.append(digest.hexdigest())
        data.forget(4 * step + 4)
    loader.close()
    return found


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_identical_over_a_thousand_batches(ahead, folder):
    batch_slice = BatchSlice(1, 2, 0, 1, CPU)
    plain = hashes(MemoryMapLoader(batch_slice, ahead=0), open_run(folder, stages(folder)), 1000)
    assert len(plain) == 1000
    assert len(set(plain)) > 500
    assert hashes(MemoryMapLoader(batch_slice, ahead=ahead), open_run(folder, stages(folder)), 1000) == plain
    assert hashes(DaliLoader(batch_slice, ahead=ahead), open_run(folder, stages(folder)), 1000) == plain


@pytest.mark.parametrize("make", [MemoryMapLoader, DaliLoader])
def test_a_step_that_was_not_foreseen(make, folder):
    """A run that goes another way gets what it asks for."""
    batch_slice = BatchSlice(0, 1, 0, 1, CPU)
    data, loader = open_run(folder, stages(folder)), make(batch_slice, ahead=2)
    reader = data.at(0)

    def upcoming():
        return iter([(reader, BatchRequest(4, 4, 4)), (reader, BatchRequest(8, 4, 4))])

    loader.load(reader, BatchRequest(0, 4, 4), upcoming)
    (batch,) = loader.load(reader, BatchRequest(100, 4, 4), lambda: iter(()))
    expected = open_run(folder, stages(folder)).at(0)
    assert [row.tolist() for row in batch.tokens] == [expected[number].tokens.tolist() for number in range(100, 104)]
    loader.close()


@pytest.mark.parametrize("make", [MemoryMapLoader, DaliLoader])
def test_a_bad_token_read_ahead_is_named_at_its_own_step(make, folder, tmp_path):
    write_source(tmp_path / "a", 4000)
    write_source(tmp_path / "b", 3500)
    data = open_run(tmp_path, stages(tmp_path))
    data.reading = type(data.reading)(False, False, vocab_size=3000)
    reader = type(data.at(0))(data, data.at(0).stage, data.at(0).phase, config=data.config, ends=None, idle={})
    good = next(n for n in range(50) if max(reader.sources["a"].tokens.num_tokens, 1) and _max(data, n) < 3000)
    bad = next(n for n in range(50) if _max(data, n) >= 3000)
    loader = make(BatchSlice(0, 1, 0, 1, CPU), ahead=1)

    def two_steps() -> None:
        loader.load(reader, BatchRequest(good, 1, 1), lambda: iter([(reader, BatchRequest(bad, 1, 1))]))
        loader.load(reader, BatchRequest(bad, 1, 1), lambda: iter(()))

    with pytest.raises(
        DataError, match=r"is not an id of the model's vocabulary of 3000 \(.*\.bin, document \d+, token"
    ):
        two_steps()
    loader.close()


def _max(data, number: int) -> int:
    _, _, runs = data.at(0).phase[number]
    return max(end for _, end in runs) - 1


def test_defaults():
    assert DataConfig().loader == "mmap"
    assert DataConfig().prefetch_steps == 1
