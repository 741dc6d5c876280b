"""Figures of routing, on one rank and on several."""

import pytest

from tests.training.attempts import attempt, configure


@pytest.mark.parametrize("ranks", [1, 2])
def test_moe_figures_do_not_depend_on_the_layout(ranks, pool, tokens, tmp_path):
    config = configure("tiny_moe", tokens, "training.train_iters=3", f"parallel.expert_model_parallel_size={ranks}")
    records = attempt(pool, ranks, config, tmp_path / "run")
    expected = attempt(pool, 1, configure("tiny_moe", tokens, "training.train_iters=3"), tmp_path / "one")
    for name in ("busiest_expert_share", "load_balancing_loss"):
        assert [record[name] for record in records] == pytest.approx([record[name] for record in expected], rel=1e-5)
