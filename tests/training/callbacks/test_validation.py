"""Validation beside training."""

import pytest

from tests.training.attempts import attempt, configure


def test_validation_does_not_disturb_training(pool, tokens, tmp_path):
    """The same losses with and without, also where parameters are gathered late."""
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    losses = {}
    for name, overrides in {
        "never": ["training.eval_interval=0"],
        "often": ["training.eval_interval=1"],
        "often, overlapped": ["training.eval_interval=1", *overlap],
    }.items():
        config = configure("tiny_dense", tokens, "training.train_iters=4", *overrides)
        records = attempt(pool, 2, config, tmp_path / name)
        losses[name] = [record["lm_loss"] for record in records]
        validated = [record["validation_loss"] for record in records if "validation_loss" in record]
        losses[f"{name}, validation"] = validated
    assert losses["never"] == losses["often"]
    assert losses["often, overlapped"] == pytest.approx(losses["often"], rel=1e-6)
    assert losses["often, overlapped, validation"] == pytest.approx(losses["often, validation"], rel=1e-6)
    assert losses["never, validation"] == losses["often, validation"][-1:]
