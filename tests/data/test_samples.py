"""Sample i is a pure function of (seed, i), and batches are the same under every data-parallel size."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_qwen.config.sections import DataConfig
from megatron_qwen.data.batches import Shard, micro_batches
from megatron_qwen.data.samples import WindowSource, open_split
from megatron_qwen.data.statistics import unigram_entropy
from megatron_qwen.data.token_file import TokenFile, TokenFileWriter
from megatron_qwen.distributed.sequence import in_global_order, slice_for_rank
from tests.conftest import environment
from tools.benchmarks.sparse_tokens import write_sparse


@pytest.fixture
def source(tokens) -> WindowSource:
    return open_split(DataConfig(path=str(tokens), seq_length=64, validation_fraction=0.1), seed=5, validate=True).train


def test_pure_function_of_seed_and_index(source, tokens):
    again = open_split(
        DataConfig(path=str(tokens), seq_length=64, validation_fraction=0.1), seed=5, validate=True
    ).train
    indices = [0, 17, source.windows - 1, source.windows, 3 * source.windows + 2]
    forward = [source[index].tokens for index in indices]
    backward = [again[index].tokens for index in reversed(indices)]
    assert all(np.array_equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    other = open_split(
        DataConfig(path=str(tokens), seq_length=64, validation_fraction=0.1), seed=6, validate=True
    ).train
    assert not np.array_equal(other[0].tokens, source[0].tokens)


def test_an_epoch_holds_every_window_once_and_the_next_is_shuffled_anew(source, tokens):
    file = TokenFile(tokens)

    def order(epoch: int) -> list[bytes]:
        return [source[epoch * source.windows + index].tokens.tobytes() for index in range(source.windows)]

    windows = [file.tokens(start, start + 64).tobytes() for start in range(0, source.windows * 64, 64)]
    assert sorted(order(0)) == sorted(order(1)) == sorted(windows)
    assert order(0) != order(1) != windows


def test_labels_are_the_next_tokens(source):
    sample = source[3]
    assert np.array_equal(sample.tokens[1:], sample.labels[:-1])
    assert sample.loss_mask.tolist() == [1.0] * 64


def test_mask_after_the_end_of_a_document(tmp_path):
    with TokenFileWriter(tmp_path / "a", vocab_size=100) as writer:
        for first in (10, 20, 30, 40):
            writer.add([first, first + 1, first + 2, 0])
    file = TokenFile(tmp_path / "a")
    source = WindowSource(file, first=0, stop=16, seq_length=5, seed=1, eod_mask_loss=True)
    for index in range(source.windows):
        sample = source[index]
        assert sample.loss_mask.tolist() == [0.0 if token == 0 else 1.0 for token in sample.tokens]


def test_split_by_document(tokens):
    file = TokenFile(tokens)
    split = open_split(DataConfig(path=str(tokens), seq_length=64, validation_fraction=0.1), seed=1, validate=True)
    held_out = max(1, round(file.num_documents * 0.1))
    boundary = file.document_start(file.num_documents - held_out)
    assert split.train.first == 0
    assert split.train.windows == (boundary - 1) // 64
    assert split.validation.first == boundary
    assert boundary - 1 in file.document_ends(boundary - 1, boundary)
    assert open_split(DataConfig(path=str(tokens), seq_length=64), seed=1, validate=False).validation is None


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 4), (8, 1)])
def test_a_global_batch_is_the_same_set_under_any_layout(dp, micro, source):
    rows = []
    for rank in range(dp):
        shard = Shard(rank, dp, 0, 1, torch.device("cpu"))
        batches = list(micro_batches(source, shard, first_sample=40, global_batch_size=8, micro_batch_size=micro))
        assert len(batches) == 8 // (dp * micro)
        rows += [row.numpy().tobytes() for batch in batches for row in batch.tokens]
    assert sorted(rows) == sorted(source[index].tokens.tobytes() for index in range(40, 48))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_slices_cover_the_sequence(size):
    whole = torch.arange(32).reshape(1, 32)
    parts = [slice_for_rank(whole, rank=rank, size=size) for rank in range(size)]
    gathered = torch.cat(parts, dim=1).squeeze(0)
    assert torch.equal(in_global_order(gathered, size) if size > 1 else gathered, whole.squeeze(0))
    # Every rank holds the same share of the causal triangle.
    assert len({int(part.sum()) for part in parts}) == 1


def test_unigram_entropy(tmp_path):
    with TokenFileWriter(tmp_path / "a", vocab_size=10) as writer:
        writer.add([1, 2] * 50)
    source = WindowSource(TokenFile(tmp_path / "a"), first=0, stop=100, seq_length=10, seed=0, eod_mask_loss=False)
    assert unigram_entropy(source, 4) == pytest.approx(np.log(2))


MEMORY = """
import sys
from megatron_qwen.config.sections import DataConfig
from megatron_qwen.data.samples import open_split
from tools.benchmarks.sample_order import private_mib
before = private_mib()
data = DataConfig(path=sys.argv[1], seq_length=4096, validation_fraction=0.0)
source = open_split(data, seed=1, validate=False).train
for index in range(200):
    source[index * 1_000_003]
print(source.windows, private_mib() - before)
"""


def test_memory_does_not_grow_with_the_source(tmp_path):
    """A source of 10^12 tokens needs what a source of 10^7 needs."""
    grown = {}
    for name, documents, length in (("small", 10, 10**6), ("huge", 1000, 10**9)):
        prefix = write_sparse(tmp_path / name, documents=documents, length=length)
        arguments = [sys.executable, "-c", MEMORY, str(prefix)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), check=True)
        windows, mib = done.stdout.split()
        assert int(windows) == (documents * length - 1) // 4096
        grown[name] = float(mib)
    print(f"private memory grew by {grown['small']:.2f} and {grown['huge']:.2f} MiB")
    assert grown["huge"] < grown["small"] + 1


def test_sparse_files_are_what_they_claim(tmp_path: Path):
    file = TokenFile(write_sparse(tmp_path / "a", documents=3, length=10))
    assert (file.num_documents, file.num_tokens) == (3, 30)
