"""How samples are made of tokens: labels, masks, independent sequences, batches under every layout."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_qwen.data.loaders.batches import BatchRequest, BatchSlice, micro_batches
from megatron_qwen.data.reading.samples import ReadingOptions, cut, packed, window
from megatron_qwen.data.reading.sources import HeldOut, open_model_source
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.token_files.statistics import unigram_entropy
from megatron_qwen.data.token_files.token_file import TokenFile, TokenFileWriter
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.distributed.sequence import in_global_order, slice_for_rank
from megatron_qwen.errors import DataError
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import environment
from tests.data.blends import open_run
from tools.dev.benchmarks.sparse_tokens import write_sparse

PLAIN = ReadingOptions(eod_mask_loss=False, reset_attention_mask=False)


def open_single(tokens: Path, *, seed: int = 5, seq_length: int = 64, fraction: float = 0.1) -> TrainingData:
    config = RECIPES["tiny_dense"]().with_section(
        "data", path=str(tokens), seq_length=seq_length, validation_fraction=fraction
    )
    return TrainingData(config.with_section("training", seed=seed))


def test_pure_function_of_seed_and_index(tokens):
    one, again, other = open_single(tokens).at(0), open_single(tokens).at(0), open_single(tokens, seed=6).at(0)
    indices = [0, 17, 900, 12_345]
    forward = [one[index].tokens for index in indices]
    backward = [again[index].tokens for index in reversed(indices)]
    assert all(np.array_equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not np.array_equal(other[0].tokens, one[0].tokens)


@pytest.fixture
def four_documents(tmp_path):
    with TokenFileWriter(tmp_path / "a", vocab_size=100) as writer:
        for first in (10, 20, 30, 40):
            writer.add([first, first + 1, first + 2, 0])
    return TokenSet(tmp_path / "a")


def test_labels_are_the_tokens_that_follow_in_the_text(four_documents):
    sample = window(four_documents, [(2, 6), (13, 16)], stop=16, reading=PLAIN)
    assert sample.tokens.tolist() == [12, 0, 20, 21, 41, 42, 0]
    assert sample.labels.tolist()[:6] == [0, 20, 21, 22, 42, 0]
    assert sample.loss_mask.tolist() == [1, 1, 1, 1, 1, 1, 0]  # nothing follows the last token of all
    assert sample.starts.tolist() == [0]


def test_masks_and_sequences_at_the_ends_of_documents(four_documents):
    masked = window(four_documents, [(2, 10)], stop=16, reading=ReadingOptions(True, False))
    assert masked.loss_mask.tolist() == [0.0 if token == 0 else 1.0 for token in masked.tokens]
    apart = window(four_documents, [(2, 10), (12, 14)], stop=16, reading=ReadingOptions(False, True))
    assert apart.starts.tolist() == [0, 2, 6, 8]


def test_packed_documents(four_documents):
    sample = packed(four_documents, [(8, 12), (0, 4)], seq_length=10, reading=PLAIN)
    assert sample.tokens.tolist() == [30, 31, 32, 0, 10, 11, 12, 0, 0, 0]
    assert sample.labels.tolist()[:3] == [31, 32, 0]
    assert sample.loss_mask.tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert sample.starts.tolist() == [0, 4, 8]
    part = packed(four_documents, [(0, 2)], seq_length=2, reading=PLAIN)
    assert part.labels.tolist() == [11, 12]  # a part of a document goes on
    assert part.loss_mask.tolist() == [1, 1]


def test_a_sample_cut_into_shorter_sequences(four_documents):
    sample = cut(window(four_documents, [(0, 12)], stop=16, reading=ReadingOptions(False, True)), 6)
    assert sample.starts.tolist() == [0, 4, 6, 8]


def test_an_id_the_model_does_not_have_is_named_by_file_and_document(four_documents):
    reading = ReadingOptions(False, False, vocab_size=42)
    window(four_documents, [(0, 12)], stop=16, reading=reading)
    with pytest.raises(
        DataError, match=r"token = 42: is not an id of the model's vocabulary of 42 \(.*/a.bin, document 3"
    ):
        window(four_documents, [(0, 4), (12, 16)], stop=16, reading=reading)


def test_split_by_document(tokens):
    file = TokenFile(tokens)
    data = open_single(tokens)
    held_out = max(1, round(file.num_documents * 0.1))
    boundary = file.document_start(file.num_documents - held_out)
    (source,) = data.sources.values()
    assert source.stop == boundary
    assert boundary - 1 in file.document_ends(boundary - 1, boundary)
    validation = data.validation(data.at(0))
    assert validation.windows == (file.num_tokens - boundary - 1) // 64
    seen = {validation[index].tokens.tobytes() for index in range(validation.windows)}
    assert seen == {
        file.tokens(start, start + 64).tobytes() for start in range(boundary, boundary + 64 * validation.windows, 64)
    }
    assert validation[validation.windows + 3].tokens.tobytes() in seen


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 4), (8, 1)])
def test_a_global_batch_is_the_same_set_under_any_layout(dp, micro, tokens):
    reader, rows = open_single(tokens).at(0), []
    for rank in range(dp):
        batch_slice = BatchSlice(rank, dp, 0, 1, torch.device("cpu"))
        batches = list(micro_batches(reader, batch_slice, BatchRequest(40, 8, micro)))
        assert len(batches) == 8 // (dp * micro)
        rows += [row.numpy().tobytes() for batch in batches for row in batch.tokens]
    assert sorted(rows) == sorted(reader[index].tokens.tobytes() for index in range(40, 48))


def test_independent_sequences_are_laid_end_to_end(tokens, tmp_path):
    blend = {"sources": {"a": {"path": str(tokens)}}, "stages": [{"name": "s", "weights": {"a": 1}}]}
    data = open_run(tmp_path, blend, seq_length=2048, reset_attention_mask=True, micro_batch_size=2)
    reader = data.at(0)
    (batch,) = micro_batches(reader, BatchSlice(0, 1, 0, 1, torch.device("cpu")), BatchRequest(0, 2, 2))
    assert batch.tokens.shape == (1, 4096)
    assert sum(batch.seq_lengths) == 4096
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *batch.seq_lengths]).tolist()
    assert 2048 in batch.cu_seqlens
    assert len(batch.seq_lengths) > 2
    starts = batch.cu_seqlens[:-1].tolist()
    assert all(batch.position_ids[0, start] == 0 for start in starts)
    assert (batch.position_ids[0].diff() == 1).sum() == 4096 - len(starts)
    assert batch.tokens[0, :2048].tolist() == reader[0].tokens.tolist()


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
        writer.add([5])
        writer.add([1, 2] * 50)
    source = open_model_source("a", open_single_spec(tmp_path / "a"), fraction=0.5)
    assert unigram_entropy(HeldOut(source, 10, 0, PLAIN), 4) == pytest.approx(np.log(2))


def open_single_spec(path: Path):
    from megatron_qwen.config.blend import SourceSpec

    return SourceSpec(path=str(path))


MEMORY = """
import sys
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.recipes.registry import RECIPES
from tools.dev.benchmarks.sample_order import private_mib
config = RECIPES["qwen2_5_0_5b"]().with_section("data", path=sys.argv[1], seq_length=4096, validation_fraction=0.0)
TrainingData  # the imports are done
before = private_mib()
reader = TrainingData(config).at(0)
for index in range(200):
    reader[index]
print(reader.data.sources["data"].stop, private_mib() - before)
"""


def test_memory_does_not_grow_with_the_source(tmp_path):
    """A source of 10^12 tokens needs what a source of 10^7 needs."""
    grown = {}
    for name, documents, length in (("small", 10, 10**6), ("huge", 1000, 10**9)):
        prefix = write_sparse(tmp_path / name, documents=documents, length=length)
        arguments = [sys.executable, "-c", MEMORY, str(prefix)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), check=True)
        tokens, mib = done.stdout.split()
        assert int(tokens) == documents * length
        grown[name] = float(mib)
    print(f"private memory grew by {grown['small']:.2f} and {grown['huge']:.2f} MiB")
    assert grown["huge"] < grown["small"] + 1


def test_sparse_files_are_what_they_claim(tmp_path: Path):
    file = TokenFile(write_sparse(tmp_path / "a", documents=3, length=10))
    assert (file.num_documents, file.num_tokens) == (3, 30)
