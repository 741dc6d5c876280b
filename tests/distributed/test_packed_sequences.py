"""Independent sequences in one row: as if each had been alone, and the same under every layout."""

from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.config.checks import require_legal
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.distributed.layouts import DENSE, MOE
from tests.tiers import cases

STEPS = 3


def config_of(recipe: str, tokens: Path, **data: Any) -> RunConfig:
    """Long rows of short documents."""
    config = RECIPES[recipe]().with_section("data", path=str(tokens), reset_attention_mask=True, seq_length=128, **data)
    return config.with_section("optim", adam_eps=1e-5).with_section("training", micro_batch_size=1, global_batch_size=4)


@pytest.fixture(scope="module")
def short_documents(tokens, tmp_path_factory) -> Path:
    """The corpus in documents of 5 to 60 tokens."""
    import random

    from megatron_qwen.data.token_files.token_file import TokenFile, TokenFileWriter

    random.seed(3)
    file, prefix = TokenFile(tokens), tmp_path_factory.mktemp("short") / "short"
    with TokenFileWriter(prefix, vocab_size=320) as writer:
        start = 0
        while start < 60_000:
            length = random.randint(5, 60)
            writer.add(file.tokens(start, start + length))
            start += length
    return prefix


def compare_with_each_alone(config: RunConfig) -> dict[str, float]:
    """Logits of a row with many sequences against those of each sequence by itself, and of the row as one."""
    import torch

    from megatron_qwen.data.loaders.batches import BatchRequest, micro_batches
    from megatron_qwen.models.sequences import packed_sequences
    from megatron_qwen.training.build import build_components

    components = build_components(config)
    reader = components.data.at(0)
    (batch,) = micro_batches(reader, components.batch_slice, BatchRequest(0, 2, 2))
    module = components.model.modules[0]
    components.model.train(False)

    def logits(tokens: torch.Tensor, positions: torch.Tensor, sequences: Any) -> torch.Tensor:
        return module(tokens, positions, None, packed_seq_params=sequences)[0]

    with torch.no_grad():
        sequences = packed_sequences(batch.cu_seqlens, batch.seq_lengths, batch.position_ids[0])
        together = logits(batch.tokens, batch.position_ids, sequences)
        worst, start = 0.0, 0
        for length in batch.seq_lengths:
            own = batch.tokens[:, start : start + length]
            alone = logits(own, torch.arange(length)[None], None)
            worst = max(worst, float((together[start : start + length] - alone).abs().max()))
            start += length
        as_one = logits(batch.tokens, torch.arange(start)[None], None)
    return {"sequences": len(batch.seq_lengths), "difference": worst, "as_one": float((together - as_one).abs().max())}


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_as_if_each_had_been_alone(recompute, pool, short_documents):
    config = jobs.with_layout(config_of("tiny_dense", short_documents), {"recompute": recompute})
    config = config.with_section("training", micro_batch_size=2)
    found = pool[1].run(compare_with_each_alone, config)[0]
    assert found["sequences"] > 6
    assert found["difference"] < 1e-5
    assert found["as_one"] > 1e-3  # attention across documents would have been noticed


@pytest.fixture(scope="module")
def one_rank(pool, short_documents):
    return {
        recipe: pool[1].run(jobs.train, config_of(recipe, short_documents), STEPS)[0]
        for recipe in ("tiny_dense", "tiny_moe")
    }


@pytest.mark.parametrize(
    ("recipe", "name"),
    cases(
        [("tiny_dense", name) for name in ("PP2xVPP2", "TP2xCP2", "full recompute")]
        + [("tiny_moe", name) for name in ("TP2+SP", "EP2")],
        [("tiny_dense", name) for name in ("TP2+SP", "PP2", "CP2", "DP2")] + [("tiny_moe", "CP2")],
    ),
)
def test_equals_one_rank(recipe, name, pool, short_documents, one_rank):
    ranks, layout = (MOE if recipe == "tiny_moe" else DENSE)[name]
    config = jobs.with_layout(config_of(recipe, short_documents), layout)
    require_legal(config, world_size=ranks)
    answers = pool[ranks].run(jobs.train, config, STEPS)
    for answer in answers:
        assert answer["losses"] == pytest.approx(one_rank[recipe]["losses"], rel=2e-5)
        assert answer["grad_norms"] == pytest.approx(one_rank[recipe]["grad_norms"], rel=2e-3)


def test_larger_micro_batches_change_nothing(pool, short_documents, one_rank):
    config = config_of("tiny_dense", short_documents).with_section("training", micro_batch_size=4)
    assert pool[1].run(jobs.train, config, STEPS)[0]["losses"] == pytest.approx(
        one_rank["tiny_dense"]["losses"], rel=2e-5
    )


def test_not_separating_is_another_loss(pool, short_documents, one_rank):
    config = config_of("tiny_dense", short_documents).with_section("data", reset_attention_mask=False)
    losses = pool[1].run(jobs.train, config, STEPS)[0]["losses"]
    assert losses != pytest.approx(one_rank["tiny_dense"]["losses"], rel=2e-5)


def test_context_parallelism_takes_one_sample_at_a_time(short_documents):
    config = config_of("tiny_dense", short_documents).with_section("training", micro_batch_size=2)
    with pytest.raises(ConfigError, match=r"packed sequences require training\.micro_batch_size=1"):
        require_legal(jobs.with_layout(config, {"context_parallel_size": 2}))
