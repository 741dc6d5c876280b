"""Padding counts as nothing: losses, gradients and expert load are those of the same tokens without it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.distributed.layouts import MOE
from tests.tiers import cases

TOKENS = 32
# Of a row, the share that is padding: a half, nine tenths.
ROWS = [2 * TOKENS, 10 * TOKENS]
SAME, UNEQUAL = [TOKENS] * 4, [TOKENS, 4, 12, 20]
LAYOUTS = {"one rank": (1, {}), **{name: MOE[name] for name in ("TP2+SP", "CP2", "PP2", "PP2xVPP2", "EP2")}}
LAYOUTS |= {name: MOE[name] for name in ("full recompute", "EP2 full recompute")}
KINDS = ["aux_loss", "seq_aux_loss", "global_aux_loss"]
# In every run: each kind of loss, and each layout that cuts a row or the routers, once or twice.
QUICK = [("aux_loss", "TP2+SP"), ("aux_loss", "PP2xVPP2"), ("aux_loss", "EP2 full recompute")]
QUICK += [("seq_aux_loss", "CP2"), ("seq_aux_loss", "EP2"), ("global_aux_loss", "TP2+SP")]
ALL = [("aux_loss", layout) for layout in LAYOUTS]
ALL += [(kind, layout) for kind in KINDS[1:] for layout in ("one rank", "TP2+SP", "CP2", "EP2")]
CASES = cases(QUICK, [case for case in ALL if case not in QUICK])


def step(config: RunConfig, lengths: list[int], row: int | None) -> dict[str, float]:
    """One step over samples of some lengths.

    Args:
        config: of the run.
        lengths: tokens of each sample.
        row: positions of each sample; what follows its tokens is other ids, which are padding. None: as many as it has
            tokens, and the model is told of no padding.
    """
    import dataclasses

    import numpy as np

    from megatron_qwen.data.loaders.batches import BatchRequest, collate
    from megatron_qwen.data.reading.samples import Sample
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.expert_load import ExpertLoad
    from megatron_qwen.training.step import train_step
    from megatron_qwen.training.step_record import StepRecord

    def sample(index: int) -> Sample:
        tokens, positions = lengths[index], row or lengths[index]
        chance, other = np.random.default_rng(index), np.random.default_rng(100 + index)
        ids = np.concatenate([chance.integers(320, size=tokens + 1), other.integers(320, size=positions - tokens)])
        mask = (np.arange(positions) < tokens).astype(np.float32)
        starts = np.asarray([0, tokens][: 1 + (positions > tokens)])
        return Sample(ids[:positions], ids[1 : positions + 1], mask, starts, padding=positions - tokens)

    config = config.with_section("data", seq_length=row or TOKENS)  # of what pipeline stages send each other
    components = build_components(config)
    load, trainer = ExpertLoad(), SimpleNamespace(components=components)
    load.before_training(trainer)
    request = BatchRequest(0, len(lengths), config.training.micro_batch_size)
    batches = [
        collate([sample(index) for index in indices], components.batch_slice, packed=True)
        for indices in request.indices(components.batch_slice)
    ]
    if row is None:
        batches = [dataclasses.replace(batch, padding=None) for batch in batches]
    result = train_step(
        config, components.model, components.optimizer, components.groups, components.forward_step, batches
    )
    record = StepRecord(1, result, 1e-3, len(lengths), 1.0, data_wait_s=0.0, stage="", config=config)
    load.after_step(trainer, record)
    return {"tokens": result.tokens, "loss": result.loss, "grad_norm": result.grad_norm, **record.extra}


def config_of(tokens: Path, kind: str, layout: dict[str, Any], *, micro_batch: int = 1) -> RunConfig:
    config = RECIPES["tiny_moe"]()
    config = config.with_section("data", path=str(tokens), seq_length=TOKENS, reset_attention_mask=True)
    # Weights at which a padded position would be seen in the gradient.
    config = config.with_section(
        "model", moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.05, moe_router_load_balancing_type=kind
    )
    config = config.with_section("training", micro_batch_size=micro_batch, global_batch_size=4)
    return jobs.with_layout(config, layout)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_equal_to_the_tokens_without_padding(kind, layout, pool, tokens):
    """In the same layout, of which megatron-core is told no padding."""
    ranks, change = LAYOUTS[layout]
    config = config_of(tokens, kind, change)
    plain = pool[ranks].run(step, config, SAME, None)[0]
    assert plain["load_balancing_loss"] > 1
    assert plain["tokens"] == sum(SAME)
    for row in [TOKENS, *ROWS]:
        assert pool[ranks].run(step, config, SAME, row)[0] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("kind", "layout"), [case for case in CASES if case[0] != "global_aux_loss"])
def test_rows_with_unequal_padding(kind, layout, pool, tokens):
    """Under every layout as on one rank, where each sample is a row without padding."""
    ranks, change = LAYOUTS[layout]
    plain = pool[1].run(step, config_of(tokens, kind, {}), UNEQUAL, None)[0]
    assert plain["tokens"] == sum(UNEQUAL)
    assert pool[ranks].run(step, config_of(tokens, kind, change), UNEQUAL, ROWS[0])[0] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("layout", cases(["CP2", "EP2"], ["one rank", "TP2+SP"]))
def test_the_global_loss_of_rows_with_unequal_padding(layout, pool, tokens):
    """However much padding; tests/core_patches/test_padded_routing.py has the values."""
    ranks, change = LAYOUTS[layout]
    config = config_of(tokens, "global_aux_loss", change)
    one, other = (pool[ranks].run(step, config, UNEQUAL, row)[0] for row in ROWS)
    assert one == pytest.approx(other, rel=1e-6)
    assert one["load_balancing_loss"] > 1


def test_a_token_weighs_the_same_on_every_data_parallel_rank(pool, tokens):
    """Two ranks with a sample each, against one with both in a micro-batch.

    megatron-core's global loss is divided by the number of data-parallel ranks, so its coefficient is doubled here.
    """
    ranks, change = LAYOUTS["EP2"]
    one = config_of(tokens, "global_aux_loss", {}, micro_batch=2).with_section("training", global_batch_size=2)
    two = config_of(tokens, "global_aux_loss", change).with_section("training", global_batch_size=2)
    two = two.with_section("model", moe_aux_loss_coeff=2 * one.model.moe_aux_loss_coeff)
    wanted = pool[1].run(step, one, UNEQUAL[:2], ROWS[0])[0]
    assert pool[ranks].run(step, two, UNEQUAL[:2], ROWS[0])[0] == pytest.approx(wanted, rel=1e-6)


def test_several_samples_in_a_row(pool, tokens):
    """Padding lies between them."""
    config = config_of(tokens, "aux_loss", {}, micro_batch=2)
    plain = pool[1].run(step, config, SAME, None)[0]
    one, other = (pool[1].run(step, config, UNEQUAL, row)[0] for row in ROWS)
    assert one == pytest.approx(other, rel=1e-6)
    for row in ROWS:
        assert pool[1].run(step, config, SAME, row)[0] == pytest.approx(plain, rel=1e-6)
