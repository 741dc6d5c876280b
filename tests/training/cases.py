"""The run that tests of a step compare with its twin in transformers: five loud steps of eight sequences."""

from pathlib import Path
from typing import Any

from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.training.reference import Documents, Row, Twin, exported

# Two steps of warm-up to 0.01, then a cosine to 0.001 at step 5: its halves are at (1 + cos 60) / 2 = 3/4 and 1/4.
RATES = [0.005, 0.01, 0.00775, 0.00325, 0.001]
STEPS, BATCH, LENGTH, MICRO_BATCH = 5, 8, 64, 2
CLIP = 0.1
WEIGHT_DECAY = 0.3
OPTIM = {
    "learning_rate": 0.01,
    "min_learning_rate": 0.001,
    "lr_warmup_iters": 2,
    "lr_decay_iters": STEPS,
    "weight_decay": WEIGHT_DECAY,
    "clip_grad": CLIP,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    # Of the size of clipped gradients: with a small one Adam hardly sees by how much gradients were scaled.
    "adam_eps": 1e-4,
}
# Of the gradient's norm in the first step, cross-entropy, balance and z-loss are about a third each.
ROUTER = {"moe_aux_loss_coeff": 0.03, "moe_z_loss_coeff": 0.0005}


def config_of(recipe: str, documents: Documents, start: Path | None = None, **sections: Any) -> RunConfig:
    """The run.

    Args:
        recipe: tiny_dense or tiny_moe.
        documents: its text.
        start: checkpoint that it begins with.
        **sections: further changes, by section; ``parallel`` is a layout.
    """
    config = RECIPES[recipe]()
    training = {"train_iters": STEPS, "global_batch_size": BATCH, "micro_batch_size": MICRO_BATCH, "eval_iters": 0}
    own: dict[str, dict[str, Any]] = {
        "model": ROUTER if recipe == "tiny_moe" else {},
        "data": {"path": str(documents.prefix), "seq_length": LENGTH},
        "optim": OPTIM,
        "training": training,
        "checkpoint": {"load": None if start is None else str(start)},
    }
    layout = sections.pop("parallel", {})
    for section in {**own, **sections}:
        config = config.with_section(section, **own.get(section, {}) | sections.get(section, {}))
    return jobs.with_layout(config, layout)


def twin_of(recipe: str, start: Path, *, clip: float | None = CLIP) -> Twin:
    """What takes the same steps by other code."""
    config = RECIPES[recipe]()
    return Twin(
        recipe,
        exported(config, start),
        optim={"betas": (0.8, 0.9), "eps": 1e-4},
        weight_decay=WEIGHT_DECAY,
        clip_grad=clip,
        aux_loss_coeff=ROUTER["moe_aux_loss_coeff"] if recipe == "tiny_moe" else 0.0,
        z_loss_coeff=ROUTER["moe_z_loss_coeff"] if recipe == "tiny_moe" else 0.0,
    )


def in_micro_batches(rows: list[Row], size: int = MICRO_BATCH) -> list[list[Row]]:
    """The rows of a step, a few at a time."""
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]
