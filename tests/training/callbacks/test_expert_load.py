"""Figures of routing, on one rank and on several."""

from types import SimpleNamespace

import pytest
import torch

from megatron_qwen.training.callbacks.expert_load import ExpertLoad
from tests.training.attempts import attempt, configure


@pytest.mark.parametrize("ranks", [1, 2])
def test_moe_figures_do_not_depend_on_the_layout(ranks, pool, tokens, tmp_path):
    config = configure("tiny_moe", tokens, "training.train_iters=3", f"parallel.expert_model_parallel_size={ranks}")
    records = attempt(pool, ranks, config, tmp_path / "run")
    expected = attempt(pool, 1, configure("tiny_moe", tokens, "training.train_iters=3"), tmp_path / "one")
    for name in ("busiest_expert_share", "load_balancing_loss"):
        assert [record[name] for record in records] == pytest.approx([record[name] for record in expected], rel=1e-5)


def test_passes_before_a_rerun_do_not_count():
    callback, router = ExpertLoad(), SimpleNamespace(training=True, layer_number=1)
    for chosen in ([[True, False]] * 3, [[False, True]] * 2):
        callback.before_rerun()
        callback._count(router, (None,), (torch.empty(0), torch.tensor(chosen)))
    assert callback._counts[0].tolist() == [0, 2]
