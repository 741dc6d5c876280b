"""A step whose numbers are not finite is left out by all ranks together."""

from typing import Any

import pytest

from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.distributed.layouts import PP2, SP, TP2
from tests.training.ranks import digest


def poisoned_step(config: RunConfig, rank_to_poison: int, value: float) -> dict[str, Any]:
    """Three steps; in the second one, one gradient element on one rank is not finite."""
    import torch.distributed as dist

    from megatron_qwen.training.build import build_components

    components = build_components(config)
    results = [jobs.step(components)]
    before = digest(components)
    parameter = next(components.model.modules[0].parameters())
    poison = dist.get_rank() == rank_to_poison

    def spoil(gradient: Any) -> Any:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    handle = parameter.register_hook(spoil) if poison else None
    results.append(jobs.step(components))
    after = digest(components)
    if handle is not None:
        handle.remove()
    results.append(jobs.step(components))
    return {
        "skipped": [result.skipped for result in results],
        "untouched": before == after,
        "moves on": digest(components) != after,
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [{}, TP2 | SP, PP2], ids=["DP2", "TP2", "PP2"])
def test_all_ranks_skip_together(layout, value, pool, tokens):
    config = RECIPES["tiny_dense"]().with_section("data", path=str(tokens)).with_section("parallel", **layout)
    for poisoned in (0, 1):
        for answer in pool[2].run(poisoned_step, config, poisoned, value):
            assert answer == {"skipped": [False, True, False], "untouched": True, "moves on": True}


def test_a_run_whose_first_steps_are_skipped_can_be_saved(pool, tokens, tmp_path):
    config = RECIPES["tiny_dense"]().with_section("data", path=str(tokens))
    pool[2].run(jobs.train, config, 0, tmp_path / "checkpoints")
    assert [iteration for iteration, _ in committed(tmp_path / "checkpoints")] == [0]
