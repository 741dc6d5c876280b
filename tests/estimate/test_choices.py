"""The preset turns on what machine, backend and layout allow, says why, and leaves alone what a person has set."""

import dataclasses

import pytest
import yaml

from megatron_qwen.config.checks import problems
from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.choices import choose, impossible
from megatron_qwen.estimate.hardware import hardware
from megatron_qwen.estimate.machine import Machine, expected
from megatron_qwen.estimate.memory import memory_per_stage
from megatron_qwen.recipes.registry import RECIPES

H200 = Machine("te", gpu=True, memory_gib=hardware("h200").memory_gib)
LADDER = [("short", 2048), ("long", 16_384)]
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


def test_saves_are_written_behind_a_gpu():
    _, values = chosen(RECIPES["qwen2_5_7b"](), H200, world_size=8)
    assert values["checkpoint.async_save"] is True
    _, values = chosen(RECIPES["qwen2_5_0_5b"](), LAPTOP, world_size=2)
    assert values["checkpoint.async_save"] is False
    forced = RECIPES["qwen2_5_0_5b"]().with_section("checkpoint", async_save=True)
    assert chosen(forced, LAPTOP, world_size=2)[1]["checkpoint.async_save"] is True


def test_data_parallel_gpus_overlap():
    _, values = chosen(RECIPES["qwen2_5_7b"](), H200, world_size=8)
    assert values["parallel.overlap_grad_reduce"] is values["parallel.overlap_param_gather"] is True
    config = RECIPES["qwen2_5_7b"]().with_section("parallel", overlap_grad_reduce=False)
    made, choices = choose(config, H200, world_size=8)
    assert made.parallel.overlap_grad_reduce is False
    assert made.parallel.overlap_param_gather is False
    assert [choice.forced for choice in choices if choice.field == "parallel.overlap_grad_reduce"] == [True]


@pytest.mark.parametrize(
    ("memory_gib", "precision_aware", "recompute"),
    [(138, False, "none"), (133, True, "none"), (90, True, "selective"), (65, True, "full")],
)
def test_memory_is_saved_step_by_step(memory_gib, precision_aware, recompute):
    """A 3B that needs 136 GiB: first what costs nothing, then what computes again as little as is enough."""
    config = RECIPES["qwen2_5_3b"]().with_section("training", micro_batch_size=12, global_batch_size=24)
    config = config.with_section("parallel", tensor_model_parallel_size=1, sequence_parallel=False)
    config = config.with_section("data", seq_length=2048)
    made, values = chosen(config, Machine("te", gpu=True, memory_gib=memory_gib), world_size=1)
    assert values["precision.use_precision_aware_optimizer"] is precision_aware
    assert values["training.recompute_granularity"] == recompute
    assert max(stage.total_gib for stage in memory_per_stage(made, world_size=1)) <= memory_gib


def too_large(**performance: object) -> dict[str, object]:
    """What is chosen for a 3B that needs 136 GiB of 65."""
    config = RECIPES["qwen2_5_3b"]().with_section("training", micro_batch_size=12, global_batch_size=24)
    config = config.with_section("parallel", tensor_model_parallel_size=1, sequence_parallel=False)
    config = config.with_section("data", seq_length=2048).with_section("performance", **performance)
    return chosen(config, Machine("te", gpu=True, memory_gib=65), world_size=1)[1]


def test_what_is_forced_bounds_what_is_chosen():
    """megatron-core has no recompute with offload, full recompute with graphs or precision-aware Adam on the host."""
    assert too_large()["training.recompute_granularity"] == "full"
    assert too_large(cpu_offloading_num_layers=4)["training.recompute_granularity"] == "none"
    assert too_large(cuda_graph_impl="local")["training.recompute_granularity"] == "selective"
    assert too_large(optimizer_offload_fraction=0.5)["precision.use_precision_aware_optimizer"] is False


def test_recompute_takes_what_a_person_has_named():
    config = RECIPES["qwen2_5_3b"]().with_section("training", micro_batch_size=12, global_batch_size=24)
    config = config.with_section("training", recompute_modules=("mlp", "layernorm"))
    config = config.with_section("parallel", tensor_model_parallel_size=1, sequence_parallel=False)
    made, _ = chosen(config.with_section("data", seq_length=2048), Machine("te", True, 90), world_size=1)
    assert made.training.recompute_granularity == "selective"
    assert made.training.recompute_modules == ("mlp", "layernorm")


def test_the_longest_stage_decides(tmp_path):
    """A run that fits at 2,048 tokens and not at 16,384 recomputes from the start."""
    stages = [{"name": name, "seq_length": length, "weights": {"a": 1}, "tokens": 10**9} for name, length in LADDER]
    del stages[-1]["tokens"]
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump({"sources": {"a": {"path": "a"}}, "stages": stages}))
    config = RECIPES["qwen2_5_3b"]().with_section("training", micro_batch_size=2, global_batch_size=24)
    config = config.with_section("parallel", tensor_model_parallel_size=1, sequence_parallel=False)
    config = config.with_section("data", seq_length=2048)
    machine = Machine("te", gpu=True, memory_gib=120)
    assert chosen(config, machine, world_size=1)[1]["training.recompute_granularity"] == "none"
    longer = config.with_section("data", blend=str(tmp_path / "blend.yaml"))
    assert choose(longer, machine, world_size=1)[0].training.recompute_granularity == "selective"


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
    emulated = RECIPES["qwen2_57b_a14b"]().with_section("performance", moe_grouped_gemm=True)
    emulated = emulated.with_section("precision", backend="torch", fp8="tensorwise", emulate_fp8=True)
    assert "performance.moe_grouped_gemm" in {problem.where for problem in impossible(emulated, LAPTOP)}
    more = {"fp8_param_gather": True, "cpu_offloading_num_layers": 2}
    config = RECIPES["qwen2_5_72b"]().with_section("performance", **more)
    assert {problem.where for problem in impossible(config, H200)} == {f"performance.{name}" for name in more}


def test_the_machine_of_a_cluster():
    config = RECIPES["qwen2_5_7b"]()
    assert expected(config, gpu=None) == LAPTOP
    assert expected(config, gpu="NVIDIA H200") == H200
    plain = config.with_section("precision", backend="torch")
    assert expected(plain, gpu="H100").backend == "torch"


def test_state_on_the_host_is_whole_and_of_bf16_weights():
    config = RECIPES["qwen2_5_0_5b"]().with_section("performance", optimizer_offload_fraction=1.0)
    assert not list(impossible(config, H200))
    wrong = config.with_section("precision", dtype="fp32", use_precision_aware_optimizer=True)
    fields = [problem.where for problem in impossible(wrong, H200)]
    assert fields == ["precision.dtype", "precision.use_precision_aware_optimizer"]
    both = config.with_section("performance", fp8_param_gather=True).with_section("precision", fp8="tensorwise")
    assert [problem.where for problem in impossible(both, H200)] == ["performance.fp8_param_gather"]


def test_weights_in_fp8_have_whole_main_weights():
    config = RECIPES["qwen2_5_0_5b"]().with_section("precision", fp8="tensorwise", use_precision_aware_optimizer=True)
    config = config.with_section("performance", fp8_param_gather=True)
    assert [problem.where for problem in impossible(config, H200)] == ["performance.fp8_param_gather"]
    assert too_large(fp8_param_gather=True)["precision.use_precision_aware_optimizer"] is False


def test_long_runs_on_a_cpu_compile():
    laptop = dataclasses.replace(LAPTOP, compiler=True)
    short, long = RECIPES["tiny_dense"](), RECIPES["qwen2_5_0_5b"]()

    def compiles(config: RunConfig, machine: Machine) -> object:
        return chosen(config, machine, world_size=1)[1]["performance.compile"]

    assert compiles(long, laptop) is True
    assert compiles(short, laptop) is False
    assert compiles(long, LAPTOP) is False  # without a compiler
    assert compiles(long, dataclasses.replace(laptop, gpu=True)) is False
    assert compiles(long, dataclasses.replace(H200, compiler=True)) is False
    (problem,) = impossible(long.with_section("performance", compile=True), H200)
    assert problem.where == "performance.compile"
