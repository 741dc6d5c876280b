"""Step times: near what was published and measured, and moving as they must with layout, batch and device."""

import pytest

from megatron_qwen.errors import ConfigError
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.hardware import hardware
from megatron_qwen.estimate.step_time import step_time
from megatron_qwen.recipes.registry import RECIPES
from tools.dev.benchmarks.predictions import WITHIN, calibrate, predicted
from tools.dev.benchmarks.published_steps import measured_steps, published_steps

PUBLISHED, MEASURED = list(published_steps()), list(measured_steps())


@pytest.mark.parametrize("step", PUBLISHED, ids=lambda step: step.name)
def test_published_steps_after_one_calibration(step):
    ratio = predicted(step, calibrate(PUBLISHED)) / step.tokens_per_second
    print(f"{step.name}: predicted / published {ratio:.3f}")
    assert 1 - WITHIN < ratio < 1 / (1 - WITHIN)


@pytest.mark.parametrize("step", MEASURED, ids=lambda step: step.name)
def test_measured_steps_with_the_default(step):
    ratio = predicted(step, Assumptions().achieved) / step.tokens_per_second
    assert 0.92 < ratio < 1.08
    assert calibrate(MEASURED) == pytest.approx(Assumptions().achieved, abs=2e-3)


def seconds(recipe="qwen2_5_7b", gpu="h100", world_size=64, assume=None, **sections):
    config = RECIPES[recipe]()
    for section, changes in sections.items():
        config = config.with_section(section, **changes)
    return step_time(config, device=hardware(gpu), world_size=world_size, assumptions=assume)


def test_parts_add_up():
    time = seconds("qwen2_5_72b", world_size=1024)
    compute = [time.gemm, time.attention, time.memory_bound, time.optimizer, time.bubble]
    communication = [time.tp_comm, time.cp_comm, time.pp_comm, time.ep_comm, time.dp_comm]
    parts = compute + communication
    assert time.seconds == pytest.approx(sum(parts))
    assert all(part >= 0 for part in parts)
    assert time.bubble > 0
    assert time.tp_comm > 0
    assert time.pp_comm > 0


def test_what_must_cost_more():
    plain = seconds()
    assert seconds(training={"recompute_granularity": "full"}).seconds > 1.15 * plain.seconds
    assert seconds(gpu="a100").seconds > 2 * plain.seconds
    assert seconds(gpu="h200").seconds < plain.seconds
    assert seconds(world_size=32).seconds > 1.8 * plain.seconds
    assert seconds(assume=Assumptions(power=0.5)).seconds > 1.5 * plain.seconds
    longer = seconds(data={"seq_length": 8192})
    assert longer.attention == pytest.approx(4 * plain.attention)
    assert longer.gemm == pytest.approx(2 * plain.gemm, rel=0.05)
    assert seconds(precision={"fp8": "tensorwise"}).gemm < 0.75 * plain.gemm


def test_pipeline_waits_less_with_virtual_stages():
    def bubble(virtual):
        layout = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": virtual}
        return seconds(parallel={**layout, "tensor_model_parallel_size": 1, "sequence_parallel": False}).bubble

    # Seven times the pipeline communication, of which a quarter is exposed.
    assert bubble(7) == pytest.approx(bubble(None) / 7, rel=0.03)


def test_experts():
    layout = {"tensor_model_parallel_size": 1, "sequence_parallel": False, "pipeline_model_parallel_size": 1}
    layout |= {"virtual_pipeline_model_parallel_size": None, "context_parallel_size": 1}

    def time(assume=None, **parallel):
        return seconds("qwen3_30b_a3b", world_size=16, assume=assume, parallel={**layout, **parallel})

    near = time(expert_model_parallel_size=8)
    far = time(expert_model_parallel_size=16)
    assert far.ep_comm > 3 * near.ep_comm  # over the network
    assert time(Assumptions(deduplicated=True), expert_model_parallel_size=16).ep_comm < far.ep_comm / 2
    # Experts of 8 ranks stay in their node whatever the tensor size of the rest.
    wide = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "expert_tensor_parallel_size": 1}
    assert time(expert_model_parallel_size=8, **wide).ep_comm == pytest.approx(near.ep_comm)
    crowded = time(Assumptions(imbalance=2.0), expert_model_parallel_size=16)
    assert crowded.ep_comm == pytest.approx(2 * far.ep_comm)
    assert crowded.gemm > far.gemm


def test_a_device_that_nobody_knows():
    with pytest.raises(ConfigError, match="use one of a100, b200, h100, h200"):
        hardware("tpu")


def test_optimizer_and_data_parallel_communication_are_shared():
    layout = {"tensor_model_parallel_size": 1, "sequence_parallel": False, "pipeline_model_parallel_size": 1}
    layout |= {"virtual_pipeline_model_parallel_size": None, "expert_model_parallel_size": 8}
    few, many = (seconds("qwen3_30b_a3b", world_size=size, parallel=layout) for size in (64, 512))
    assert many.optimizer < few.optimizer / 6
    hidden = layout | {"overlap_grad_reduce": True, "overlap_param_gather": True}
    assert seconds("qwen3_30b_a3b", world_size=64, parallel=hidden).dp_comm < few.dp_comm
    # One rank a node has one link, eight have eight.
    one_link, eight = ({"tensor_model_parallel_size": size, "sequence_parallel": size > 1} for size in (8, 1))
    assert seconds("qwen2_5_72b", world_size=1024, parallel=one_link).dp_comm > 0
    assert seconds(world_size=64, parallel=eight).dp_comm < 0.2 * seconds(world_size=64, parallel=eight).seconds


def test_what_is_not_predicted():
    from megatron_qwen.estimate.speed import expected_speed, why_not

    config = RECIPES["qwen2_5_7b"]()
    for words, gpu in (
        ({"dtype": "fp32"}, "h100"),
        ({"fp8": "tensorwise", "emulate_fp8": True}, "h100"),
        ({"fp8": "tensorwise"}, "a100"),
        ({"fp8": "mxfp8"}, "h200"),
    ):
        wrong = config.with_section("precision", **words)
        assert "; set precision." in (why_not(wrong, hardware(gpu)) or "")
        assert expected_speed(wrong, gpu=gpu.upper(), world_size=8) is None
    assert why_not(config.with_section("precision", fp8="mxfp8"), hardware("b200")) is None
    assert expected_speed(config, gpu="NVIDIA GH200 480GB", world_size=8) is None
