"""The preset turns on what machine, backend and layout allow, says why, and leaves alone what a person has set."""

import dataclasses

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.choices import choose, impossible
from megatron_qwen.estimate.hardware import hardware
from megatron_qwen.estimate.machine import Machine, expected
from megatron_qwen.estimate.memory import memory_per_stage
from megatron_qwen.recipes.registry import RECIPES

H200 = Machine("te", gpu=True, memory_gib=hardware("h200").memory_gib)
LAPTOP = Machine("torch", gpu=False)


def chosen(config: RunConfig, machine: Machine, *, world_size: int) -> tuple[RunConfig, dict[str, object]]:
    made, choices = choose(config, machine, world_size=world_size)
    assert all(choice.reason for choice in choices)
    assert not problems(made, world_size=world_size)
    return made, {choice.field: choice.value for choice in choices}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("machine", [H200, LAPTOP, Machine("torch", gpu=True, memory_gib=79.1)])
def test_nothing_is_left_open_and_a_choice_stands(recipe, machine):
    config = RECIPES[recipe]()
    world = config.parallel.model_parallel_size * config.parallel.expert_model_parallel_size
    made, _ = choose(config, machine, world_size=world)
    section = dataclasses.asdict(made.performance) | dataclasses.asdict(made.parallel)
    open_fields = {name for name, value in section.items() if value is None}
    assert not open_fields & {"overlap_grad_reduce", "moe_token_dispatcher", "garbage_collection_interval"}
    again, choices = choose(made, machine, world_size=world)
    assert again == made
    assert all(choice.forced for choice in choices)


def test_a_laptop_overlaps_nothing():
    _, values = chosen(RECIPES["qwen2_5_0_5b"](), LAPTOP, world_size=2)
    assert values["parallel.overlap_grad_reduce"] is False
    assert values["training.recompute_granularity"] == "none"
    assert values["performance.garbage_collection_interval"] == 100
    _, alone = chosen(RECIPES["qwen2_5_0_5b"](), LAPTOP, world_size=1)
    assert alone["performance.garbage_collection_interval"] == 0


def test_data_parallel_gpus_overlap():
    _, values = chosen(RECIPES["qwen2_5_7b"](), H200, world_size=8)
    assert values["parallel.overlap_grad_reduce"] is values["parallel.overlap_param_gather"] is True
    config = RECIPES["qwen2_5_7b"]().with_section("parallel", overlap_grad_reduce=False)
    made, choices = choose(config, H200, world_size=8)
    assert made.parallel.overlap_grad_reduce is False
    assert made.parallel.overlap_param_gather is False
    assert [choice.forced for choice in choices if choice.field == "parallel.overlap_grad_reduce"] == [True]


@pytest.mark.parametrize(
    ("memory_gib", "lean", "recompute"),
    [(138, False, "none"), (133, True, "none"), (90, True, "selective"), (65, True, "full")],
)
def test_memory_is_saved_step_by_step(memory_gib, lean, recompute):
    """A 3B that needs 136 GiB: first what costs nothing, then what computes again as little as is enough."""
    config = RECIPES["qwen2_5_3b"]().with_section("training", micro_batch_size=12, global_batch_size=24)
    config = config.with_section("parallel", tensor_model_parallel_size=1, sequence_parallel=False)
    config = config.with_section("data", seq_length=2048)
    made, values = chosen(config, Machine("te", gpu=True, memory_gib=memory_gib), world_size=1)
    assert values["precision.use_precision_aware_optimizer"] is lean
    assert values["training.recompute_granularity"] == recompute
    assert max(stage.total_gib for stage in memory_per_stage(made, world_size=1)) <= memory_gib


def test_a_mixture_on_gpus():
    config = RECIPES["qwen2_57b_a14b"]()
    world = config.parallel.model_parallel_size * config.parallel.expert_model_parallel_size
    _, values = chosen(config, H200, world_size=world)
    assert values["performance.moe_grouped_gemm"] is True
    assert values["performance.moe_shared_expert_overlap"] is True
    assert values["performance.moe_token_dispatcher"] == "alltoall"
    with_library = dataclasses.replace(H200, libraries=frozenset({"deep_ep"}))
    _, values = chosen(config, with_library, world_size=world)
    assert values["performance.moe_token_dispatcher"] == "deepep"


def test_preset_none_leaves_off_what_is_not_asked_for():
    config = RECIPES["qwen2_5_7b"]().with_section("performance", preset="none", garbage_collection_interval=7)
    _, values = chosen(config, H200, world_size=8)
    assert values["performance.garbage_collection_interval"] == 7
    assert values["parallel.overlap_grad_reduce"] is False
    assert values["performance.fused_kernels"] is False


def test_what_cannot_be_is_said_at_once():
    asked = {"tp_comm_overlap": True, "cuda_graph_impl": "local", "moe_token_dispatcher": "hybridep"}
    config = RECIPES["qwen2_5_7b"]().with_section("performance", **asked)
    assert {problem.where for problem in impossible(config, LAPTOP)} == {f"performance.{name}" for name in asked}
    assert [problem.where for problem in impossible(config, H200)] == ["performance.moe_token_dispatcher"]


def test_the_machine_of_a_cluster():
    config = RECIPES["qwen2_5_7b"]()
    assert expected(config, gpu=None) == LAPTOP
    assert expected(config, gpu="NVIDIA H200") == H200
    plain = config.with_section("precision", backend="torch")
    assert expected(plain, gpu="H100").backend == "torch"
