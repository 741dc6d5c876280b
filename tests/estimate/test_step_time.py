"""Step times: near published and measured ones, by hand for a small model, and moving as they must."""

from dataclasses import replace

import pytest

from megatron_qwen.errors import ConfigError
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.hardware import hardware
from megatron_qwen.estimate.layer_time import layer_time
from megatron_qwen.estimate.memory import parameters_per_rank
from megatron_qwen.estimate.step_time import StepTime, step_time
from megatron_qwen.recipes.registry import RECIPES
from tests.estimate.by_hand import (
    DENSE,
    DEVICE,
    KV,
    LAYERS,
    LENGTH,
    MOE,
    PADDED,
    TOKENS,
    TOPK,
    VOCABULARY,
    F,
    H,
    Q,
    changed,
    tensor_parallel,
)
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


def by_hand(config=DENSE, device=DEVICE, *, world_size=1, assume=None, **sections):
    """A step of the small model on the device of one FLOP and one byte a second, which reaches all of its rates."""
    assume = assume or Assumptions(achieved=1.0)
    return step_time(changed(config, **sections), device=device, world_size=world_size, assumptions=assume)


# By micro-batch: FLOPs of the GEMMs and bytes of a layer (test_layer_time.py), and of the loss: 6 FLOPs for each scalar
# of the output matrix and token, 8 bytes a logit, and 20 for each scalar's gradient.
PER_TOKEN = 6 * (H * (Q + 2 * KV) + Q * H + 3 * H * F)
LAYER_GEMM, LAYER_BYTES = TOKENS * PER_TOKEN, 2 * 2 * TOKENS * (29 * H + 8 * F)
LOSS_GEMM = 6 * TOKENS * H * VOCABULARY
LOSS_BYTES = 8 * TOKENS * VOCABULARY + 20 * VOCABULARY * H
# Scalars outside the layers: the padded embedding; a dense layer's with bias and norms.
EMBEDDING, LAYER = PADDED * H, H * (Q + 2 * KV) + Q * H + 3 * H * F + (Q + 2 * KV) + 2 * H


def test_seconds_are_the_sum_of_all_parts():
    parts = [float(2**power) for power in range(10)]
    assert StepTime(*parts, tokens=5).seconds == 2**10 - 1


def test_a_step_on_one_device_by_hand():
    """12 micro-batches of 2 sequences: six layers, the loss, and 40 bytes of each parameter for the optimizer."""
    time = by_hand()
    assert time.gemm == pytest.approx(12 * (LAYERS * LAYER_GEMM + LOSS_GEMM))
    assert time.attention == pytest.approx(12 * LAYERS * layer_time(DENSE, DEVICE, Assumptions(), fp8=False).attention)
    assert time.memory_bound == pytest.approx(12 * (LAYERS * LAYER_BYTES + LOSS_BYTES))
    assert time.optimizer == pytest.approx(40 * (2 * EMBEDDING + LAYERS * LAYER + H))
    assert (time.tp_comm, time.cp_comm, time.pp_comm, time.ep_comm, time.dp_comm, time.bubble) == (0, 0, 0, 0, 0, 0)
    assert time.tokens == 24 * LENGTH


def test_achieved_fraction_and_power_by_hand():
    plain, slower = by_hand(), by_hand(assume=Assumptions(achieved=0.5))
    assert slower.gemm == pytest.approx(2 * plain.gemm)
    assert slower.memory_bound == pytest.approx(2 * plain.memory_bound)
    assert slower.optimizer == plain.optimizer
    assert by_hand(assume=Assumptions(achieved=1.0, power=0.5)).gemm == pytest.approx(2 * plain.gemm)
    default = step_time(DENSE, device=DEVICE, world_size=1)
    assert default.gemm == pytest.approx(plain.gemm / Assumptions().achieved)


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 12), (4, 3), (8, 1), (48, 1)])
def test_ranks_share_the_micro_batches(world_size, micro_batches):
    """24 sequences in micro-batches of 2; 8 ranks make one and a half each, of which one fits."""
    assert by_hand(world_size=world_size).gemm == pytest.approx(micro_batches * (LAYERS * LAYER_GEMM + LOSS_GEMM))


def test_tensor_and_context_parallel_communication_of_all_layers():
    layout = {**tensor_parallel(2), "context_parallel_size": 2}
    time = by_hand(world_size=4, parallel=layout)
    assert time.tp_comm == pytest.approx(12 * LAYERS * 8 * 2 * TOKENS / 2 * H / 2)
    assert time.cp_comm == pytest.approx(12 * LAYERS * 3 * 2 * 2 * KV / 2 * TOKENS / 2)
    assert time.gemm == pytest.approx(12 * (LAYERS * LAYER_GEMM + LOSS_GEMM) / 4)
    loss_bytes = 8 * TOKENS / 2 * VOCABULARY / 2 + 20 * VOCABULARY / 2 * H
    assert time.memory_bound == pytest.approx(12 * (LAYERS * LAYER_BYTES / 4 + loss_bytes))


def test_expert_parallel_communication_of_all_layers():
    time = by_hand(MOE, world_size=4, parallel={"expert_model_parallel_size": 4})
    assert time.ep_comm == pytest.approx(3 * LAYERS * 4 * 2 * H * TOKENS * TOPK * 3 / 4)


PP2, PP3 = {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 3}


@pytest.mark.parametrize(
    ("parallel", "tp", "chunks", "exposed"),
    [
        ({}, 1, 1, 1),
        ({"virtual_pipeline_model_parallel_size": 2}, 1, 2, 1 / 4),
        ({"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": False}, 1, 2, 1),
        (tensor_parallel(2), 2, 1, 1),
        ({"tensor_model_parallel_size": 2}, 1, 1, 1),
        ({"context_parallel_size": 2}, 2, 1, 1),
    ],
    ids=["1F1B", "interleaved", "without overlap", "sequence-parallel", "tensor-parallel", "context-parallel"],
)
def test_pipeline_communication(parallel, tp, chunks, exposed):
    """An activation and a gradient of each chunk by the network, which takes 4 s a byte; a rank has its own tokens."""
    time = by_hand(
        world_size=3 * changed(DENSE, parallel=parallel).parallel.model_parallel_size, parallel=PP3 | parallel
    )
    assert time.pp_comm == pytest.approx(12 * exposed * chunks * 2 * 2 * TOKENS * H / tp * 4)


@pytest.mark.parametrize(
    ("first", "last", "layers", "loss"),
    [(4, 1, 4, 0), (1, 1, 4, 0), (1, 4, 4, 1), (None, None, 2, 1)],
    ids=["first", "middle", "last", "last, for its loss"],
)
def test_the_slowest_stage_sets_the_pace(first, last, layers, loss):
    uneven = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    time = by_hand(world_size=3, parallel=PP3 | uneven)
    assert time.gemm == pytest.approx(12 * (layers * LAYER_GEMM + loss * LOSS_GEMM))
    assert time.memory_bound == pytest.approx(12 * (layers * LAYER_BYTES + loss * LOSS_BYTES))


@pytest.mark.parametrize(("virtual", "micro_batches"), [(None, 2), (2, 1)])
def test_the_bubble_by_hand(virtual, micro_batches):
    """(p - 1) / v micro-batches of the slowest of 3 stages, at the speed that the others have too."""
    assume = Assumptions(achieved=0.5)
    layout = PP3 | {"virtual_pipeline_model_parallel_size": virtual}
    time = by_hand(world_size=3, parallel=layout, assume=assume)
    busy = time.gemm + time.attention + time.memory_bound + time.pp_comm
    assert time.bubble == pytest.approx(micro_batches * busy / 12)


@pytest.mark.parametrize(
    ("precision", "in_bf16"),
    [
        ({"fp8": "delayed"}, (0, 0, 0)),
        ({"fp8": "tensorwise", "first_last_layers_bf16": False}, (0, 0, 0)),
        ({"fp8": "tensorwise"}, (1, 0, 1)),
        ({"fp8": "tensorwise", "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 0}, (2, 0, 0)),
        ({"fp8": "tensorwise", "num_layers_at_start_in_bf16": 9, "num_layers_at_end_in_bf16": 2}, (4, 0, 2)),
    ],
    ids=["delayed", "all in FP8", "one at each end", "two at the start", "more than there are"],
)
@pytest.mark.parametrize("slowest", [0, 1, 2])
def test_layers_that_stay_in_bf16(precision, in_bf16, slowest):
    """Three stages, of which one has four layers and is the slowest, the others have one. FP8 is twice as fast."""
    uneven = {0: (4, 1), 1: (1, 1), 2: (1, 4)}[slowest]
    layout = {"num_layers_in_first_pipeline_stage": uneven[0], "num_layers_in_last_pipeline_stage": uneven[1]}
    time = by_hand(world_size=3, parallel=PP3 | layout, precision=precision)
    bf16 = in_bf16[slowest]
    loss = LOSS_GEMM if slowest == 2 else 0
    assert time.gemm == pytest.approx(12 * ((bf16 + (4 - bf16) / 2) * LAYER_GEMM + loss))


def test_bf16_layers_at_both_ends_of_a_single_stage():
    time = by_hand(precision={"fp8": "tensorwise", "num_layers_at_end_in_bf16": 2})
    assert time.gemm == pytest.approx(12 * ((3 + 3 / 2) * LAYER_GEMM + LOSS_GEMM))


@pytest.mark.parametrize(
    ("tp", "ranks", "seconds_per_byte"),
    [(1, 4, 1), (1, 8, 1), (2, 4, 1), (2, 8, 2), (4, 8, 4), (8, 16, 4)],
    ids=["one node", "four links", "two to a weight", "two links", "one link", "groups of more than a node"],
)
def test_data_parallel_communication(tp, ranks, seconds_per_byte):
    """fp32 gradients are reduced and bf16 weights gathered: 6 bytes of each scalar of (n - 1) / n of the buffer.

    Nodes have 4 devices. A rank's network link takes 4 s a byte, NVLink 1; a group uses the links of its members.
    """
    scalars = sum(parameters_per_rank(changed(DENSE, parallel=tensor_parallel(tp)), stage=0))
    copies = ranks // tp
    time = by_hand(world_size=ranks, parallel=tensor_parallel(tp))
    assert time.dp_comm == pytest.approx(6 * scalars * (copies - 1) / copies * seconds_per_byte)
    assert time.optimizer == pytest.approx(40 * scalars / copies)
    bf16 = by_hand(world_size=ranks, parallel=tensor_parallel(tp), precision={"grad_reduce_in_fp32": False})
    assert bf16.dp_comm == pytest.approx(time.dp_comm * 4 / 6)


def test_context_parallel_ranks_hold_the_same_weights():
    time = by_hand(world_size=4, parallel={"context_parallel_size": 2})
    assert time.dp_comm == by_hand(world_size=4).dp_comm
    assert time.optimizer == by_hand(world_size=4).optimizer


@pytest.mark.parametrize(("ep", "etp"), [(4, 1), (2, 2)])
def test_experts_are_shared_outside_their_grid(ep, etp):
    """Two stages of 8 ranks, TP 2: dense weights are on 4 ranks, 2 apart; those of a grid of 4 on 2 ranks, 4 apart."""
    layout = {**tensor_parallel(2), **PP2, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    dense, experts = parameters_per_rank(changed(MOE, parallel=layout), stage=0)
    time = by_hand(MOE, world_size=16, parallel=layout)
    assert time.optimizer == pytest.approx(40 * (dense / 4 + experts / 2))
    # Two nodes of 4: groups of dense weights have two links, those of experts one.
    assert time.dp_comm == pytest.approx(6 * (dense * 3 / 4 * 2 + experts / 2 * 4))


@pytest.mark.parametrize(
    ("overlap", "exposed"),
    [({"overlap_grad_reduce": True}, (1, 0)), ({"overlap_param_gather": True}, (0, 1))],
    ids=["gradients", "weights"],
)
def test_communication_hides_behind_a_part_of_a_micro_batch(overlap, exposed):
    """0.7 of half a micro-batch, for each of the two; no more than there is to hide."""
    slow = replace(DEVICE, nvlink_gb_s=1e-12)
    plain, hidden = by_hand(device=slow, world_size=4), by_hand(device=slow, world_size=4, parallel=overlap)
    micro_batch = (plain.gemm + plain.attention + plain.memory_bound) / 3
    assert plain.dp_comm - hidden.dp_comm == pytest.approx(0.7 * micro_batch / 2)
    left = by_hand(world_size=4, parallel=overlap).dp_comm  # at 1 byte a second all of it is hidden
    scalars = sum(parameters_per_rank(DENSE, stage=0)) * 3 / 4
    assert left == pytest.approx((2 * exposed[0] + 4 * exposed[1]) * scalars)
