"""Compiled runs are those without kernels; where a compiler does not work, no rank compiles."""

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError
from megatron_qwen.estimate.choices import PresetChoice
from megatron_qwen.models.torch_backend import dense_gemm
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.training import kernels
from tests.distributed import jobs
from tests.tiers import cases


@pytest.mark.parametrize(
    ("recipe", "ranks", "layout"), cases([("tiny_moe", 1, {})], [("tiny_dense", 2, {"tensor_model_parallel_size": 2})])
)
def test_a_compiled_run_is_that_without(recipe, ranks, layout, pool, tokens):
    config = jobs.with_layout(resolve(recipe, [f"data.path={tokens}"], RECIPES), layout)
    (plain, fewer, none), (compiled, more, made) = (
        pool[ranks].run(with_large_products, config.with_section("performance", compile=wanted), 3)[0]
        for wanted in (False, True)
    )
    assert compiled == pytest.approx(plain, rel=1e-5)
    # Not by their rounding: on some processors it is that of the plain operations.
    assert none == 0
    assert made >= 5, "norms, SwiGLU and RoPE forward and backward, the loss"
    assert more > fewer, "no weight gradient was oneDNN's"


def with_large_products(config, steps):
    """Losses of a run whose weight gradients all count as large, and as oneDNN's; its GEMMs; its kernels."""
    calls, onednn = [], dense_gemm._onednn

    def counted(*args):
        calls.append(1)
        return onednn(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_LEAST_ROWS", 1), ("_LEAST_WEIGHTS", 1), ("_onednn_pays", lambda: True)):
            patch.setattr(dense_gemm, name, value)
        patch.setattr(dense_gemm, "_onednn", counted)
        losses = jobs.train(config, steps)["losses"]
        return losses, len(calls), 0 if PROCESS_KERNELS.present is None else len(PROCESS_KERNELS.present._made)


def with_a_broken_compiler(config, choices):
    """What a rank goes on with, or the error, where the last rank's compiler fails."""
    import torch.distributed as dist

    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.MonkeyPatch.context() as patch, PROCESS_KERNELS.using(None):
        patch.setattr(kernels, "compiler_failure", lambda: "no space left" if last else None)
        try:
            config, choices = kernels.start_kernels(config, choices)
        except ConfigError as error:
            return str(error)
        return config.performance.compile, PROCESS_KERNELS.present is not None, [str(choice) for choice in choices]


def test_one_broken_compiler_counts_for_all(pool):
    config = RECIPES["tiny_dense"]().with_section("performance", compile=True)
    chosen, forced = (PresetChoice("performance.compile", True, "long enough", forced) for forced in (False, True))
    said = "performance.compile=false: torch.compile does not work on rank 1: no space left"
    assert pool[2].run(with_a_broken_compiler, config, [chosen]) == [(False, False, [said])] * 2
    for answer in pool[2].run(with_a_broken_compiler, config, [forced]):
        assert "torch.compile does not work on rank 1: no space left" in answer
