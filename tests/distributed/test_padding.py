"""Padding counts as nothing: losses, gradients and expert load are those of the same tokens without it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.distributed.layouts import MOE

TOKENS, SAMPLES = 32, 4
# Of a row, the share that is padding: none, a half, nine tenths.
LENGTHS = [TOKENS, 2 * TOKENS, 10 * TOKENS]
LAYOUTS = {"one rank": (1, {}), **{name: MOE[name] for name in ("TP2+SP", "CP2", "PP2", "PP2xVPP2", "EP2")}}
LAYOUTS |= {name: MOE[name] for name in ("full recompute", "EP2 full recompute")}
KINDS = ["aux_loss", "seq_aux_loss", "global_aux_loss"]


def padded_step(config: RunConfig, length: int) -> dict[str, float]:
    """One step over rows that hold TOKENS tokens and, up to ``length``, other ids that are padding."""
    import numpy as np

    from megatron_qwen.data.loaders.batches import BatchRequest, collate
    from megatron_qwen.data.reading.samples import Sample
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.expert_load import ExpertLoad
    from megatron_qwen.training.step import train_step
    from megatron_qwen.training.step_record import StepRecord

    def sample(index: int) -> Sample:
        chance, other = np.random.default_rng(index), np.random.default_rng(100 + index)
        row = np.concatenate([chance.integers(320, size=TOKENS + 1), other.integers(320, size=length - TOKENS)])
        mask = (np.arange(length) < TOKENS).astype(np.float32)
        starts = np.asarray([0, TOKENS][: 1 + (length > TOKENS)])
        return Sample(row[:length], row[1 : length + 1], mask, starts, padding=length - TOKENS)

    config = config.with_section("data", seq_length=length)  # of what pipeline stages send each other
    components = build_components(config)
    load, trainer = ExpertLoad(), SimpleNamespace(components=components)
    load.before_training(trainer)
    request = BatchRequest(0, SAMPLES, config.training.micro_batch_size)
    batches = [
        collate([sample(index) for index in indices], components.batch_slice, packed=True)
        for indices in request.indices(components.batch_slice)
    ]
    result = train_step(
        config, components.model, components.optimizer, components.groups, components.forward_step, batches
    )
    record = StepRecord(1, result, 1e-3, SAMPLES, 1.0, data_wait_s=0.0, stage="", config=config)
    load.after_step(trainer, record)
    return {"tokens": result.tokens, "loss": result.loss, "grad_norm": result.grad_norm, **record.extra}


def config_of(tokens: Path, kind: str, layout: dict[str, Any], *, micro_batch: int = 1) -> RunConfig:
    config = RECIPES["tiny_moe"]()
    config = config.with_section("data", path=str(tokens), seq_length=TOKENS, reset_attention_mask=True)
    # Weights at which a padded position would be seen in the gradient.
    config = config.with_section(
        "model", moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.05, moe_router_load_balancing_type=kind
    )
    config = config.with_section("training", micro_batch_size=micro_batch, global_batch_size=SAMPLES)
    return jobs.with_layout(config, layout)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*((kind, "one rank") for kind in KINDS), *(("aux_loss", layout) for layout in LAYOUTS if layout != "one rank")],
)
def test_equal_to_the_tokens_without_padding(kind, layout, pool, tokens):
    ranks, change = LAYOUTS[layout]
    config = config_of(tokens, kind, change)
    plain, *padded = [pool[ranks].run(padded_step, config, length)[0] for length in LENGTHS]
    assert plain["load_balancing_loss"] > 1
    assert plain["tokens"] == SAMPLES * TOKENS
    for one in padded:
        assert one == pytest.approx(plain, rel=1e-6)


def test_several_samples_in_a_row(pool, tokens):
    """Padding lies between them."""
    config = config_of(tokens, "aux_loss", {}, micro_batch=2)
    plain, *padded = [pool[1].run(padded_step, config, length)[0] for length in LENGTHS]
    for one in padded:
        assert one == pytest.approx(plain, rel=1e-6)
