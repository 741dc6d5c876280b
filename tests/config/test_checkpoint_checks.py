"""What the section ``checkpoint`` refuses."""

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.recipes.registry import RECIPES


@pytest.mark.parametrize(
    ("changes", "performance", "says"),
    [
        ({"load": "/a", "branch_from": "/b"}, {}, "checkpoint.branch_from = /b: cannot be combined with"),
        ({"save_at": (0,)}, {}, "checkpoint.save_at = [0]: must hold iterations of at least 1"),
        ({"local_interval": 2, "local_dir": "shm"}, {}, "checkpoint.local_dir = shm: must be an absolute path"),
        (
            {"local_interval": 2},
            {"fp8_param_gather": True},
            "cannot be combined with performance.fp8_param_gather=true",
        ),
        ({"local_interval": 2}, {"optimizer_offload_fraction": 0.5}, "performance.optimizer_offload_fraction=0.5"),
    ],
)
def test_what_is_refused(changes, performance, says):
    config = RECIPES["tiny_dense"]().with_section("checkpoint", **changes).with_section("performance", **performance)
    assert any(says in str(problem) for problem in problems(config))


def test_scales_of_fp8_are_in_no_local_checkpoint():
    config = RECIPES["tiny_dense"]().with_section("checkpoint", local_interval=2)
    real = config.with_section("precision", fp8="tensorwise", backend="te", dtype="bf16")
    (problem,) = problems(real)
    assert "checkpoint.local_interval = 2: cannot be combined with precision.fp8=tensorwise" in str(problem)
    assert problems(config.with_section("precision", fp8="tensorwise", emulate_fp8=True)) == []


def test_what_is_legal():
    for changes in ({"save_interval": None}, {"local_interval": 2}, {"local_interval": 2, "local_dir": "$SCRATCH/%n"}):
        assert problems(RECIPES["tiny_dense"]().with_section("checkpoint", **changes)) == []
    # Without local checkpoints nothing is said about their directory.
    assert problems(RECIPES["tiny_dense"]().with_section("checkpoint", local_dir="shm")) == []
