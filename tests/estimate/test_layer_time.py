"""Seconds of a layer, part by part, against FLOPs and bytes that were counted by hand.

The device makes one FLOP and moves one byte a second (by_hand.py), so that a time is a count.
"""

from dataclasses import replace

import pytest

from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.hardware import GemmRate
from megatron_qwen.estimate.layer_time import MicroBatchTime, layer_time, linear_time
from tests.estimate.by_hand import (
    DENSE,
    DEVICE,
    EXPERTS,
    KV,
    LENGTH,
    MOE,
    SHARED,
    TOKENS,
    TOPK,
    WIDTH,
    F,
    H,
    Q,
    changed,
    rate,
    tensor_parallel,
)

# Scalars of the matrices of a layer: attention's, one expert's, the shared expert's.
ATTENTION = H * (Q + 2 * KV) + Q * H
MLP, EXPERT, SHARED_EXPERT = 3 * H * F, 3 * H * WIDTH, 3 * H * SHARED
# Bytes of the memory-bound operations, which reach half the bandwidth: 29 passes over the residual stream, 8 over what
# SwiGLU multiplies and 12 over a routed row, all in bf16.
BYTES = 2 * 2
# FLOPs of attention by query, key and channel: 4 forward, and 10 backward, at twice the rate; narrow heads reach 60 %.
PAIRS = TOKENS * Q * LENGTH / 2
SCORES_FORWARD, SCORES_BACKWARD = 4 * PAIRS / 0.6, 10 * PAIRS / 2 / 0.6


def layer(config=DENSE, device=DEVICE, *, fp8=False, assume=None, **sections) -> MicroBatchTime:
    return layer_time(changed(config, **sections), device, assume or Assumptions(), fp8=fp8)


def test_a_linear_layer_by_hand():
    """Three GEMMs of 2 x 2 x 5 x 7 FLOPs, and the bytes of their operands, 3 each, and results, of which half show."""
    exposed = GemmRate(tflops=1e-12, exposed_traffic=0.5, launch_us=1e6, element_bytes=3.0)
    forward = 140 + 0.5 * (3 * (2 * 5 + 5 * 7) + 2 * 2 * 7) + 1
    input_gradient = 140 + 0.5 * (3 * (2 * 7 + 7 * 5) + 2 * 2 * 5) + 1
    weight_gradient = 140 + 0.5 * (3 * (5 * 2 + 2 * 7) + 8 * 5 * 7) + 1  # the fp32 sum is read and written
    assert linear_time(exposed, DEVICE, 2, 5, 7, 0.0) == pytest.approx(forward + input_gradient + weight_gradient)
    assert linear_time(exposed, DEVICE, 2, 5, 7, 1.5) == pytest.approx(2.5 * forward + input_gradient + weight_gradient)


def test_sum_and_multiple_of_times_go_part_by_part():
    ones = MicroBatchTime(1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
    assert ones.total == 1_111_111
    assert ones + ones.times(3) == MicroBatchTime(4, 40, 400, 4000, 40_000, 400_000, 4_000_000)
    assert MicroBatchTime().total == 0


def test_parts_of_a_dense_layer():
    """6 FLOPs a parameter and token, the products of attention, and bytes of the memory-bound operations."""
    time = layer()
    assert time.gemm == pytest.approx(6 * TOKENS * (ATTENTION + MLP))
    assert time.attention == pytest.approx(SCORES_FORWARD + SCORES_BACKWARD)
    assert time.memory_bound == pytest.approx(BYTES * TOKENS * (29 * H + 8 * F))
    assert (time.tp_comm, time.cp_comm, time.pp_comm, time.ep_comm) == (0, 0, 0, 0)


def test_less_power_slows_gemms_and_attention():
    plain, half = layer(), layer(assume=Assumptions(power=0.5))
    assert half.gemm == pytest.approx(2 * plain.gemm)
    assert half.attention == pytest.approx(2 * plain.attention)
    assert half.memory_bound == plain.memory_bound


def test_fp8_doubles_the_rate_and_rounds_the_operands():
    """Inputs of the four GEMMs are H, Q, H and F wide, the gradients of their outputs Q + 2 KV, H, 2 F and H."""
    time = layer(fp8=True)
    operands = (H + Q + H + F) + (Q + 2 * KV + H + 2 * F + H)
    assert time.gemm == pytest.approx(3 * TOKENS * (ATTENTION + MLP))
    assert time.memory_bound == pytest.approx(TOKENS * (BYTES * (29 * H + 8 * F) + 2 * 6 * operands))
    assert layer(device=replace(DEVICE, fp8=None), fp8=True).gemm == layer().gemm


def test_wide_heads_reach_the_whole_rate():
    time = layer(model={"kv_channels": 128})
    pairs = TOKENS * 4 * 128 * LENGTH / 2
    assert time.attention == pytest.approx(4 * pairs + 10 * pairs / 2)
    assert layer(model={"kv_channels": 64}).attention == pytest.approx(time.attention / 2 / 0.6)


def test_tensor_parallel_ranks_share_a_dense_layer():
    time = layer(parallel=tensor_parallel(2))
    assert time.gemm == pytest.approx(6 * TOKENS * (ATTENTION + MLP) / 2)
    assert time.attention == pytest.approx((SCORES_FORWARD + SCORES_BACKWARD) / 2)
    assert time.memory_bound == pytest.approx(BYTES * TOKENS * (29 * H + 8 * F) / 2)
    # Each GEMM's own side is split, the side that is gathered before it or reduced after it is whole.
    operands = (H + Q / 2 + H + F / 2) + ((Q + 2 * KV) / 2 + H + F + H)
    rounding = layer(parallel=tensor_parallel(2), fp8=True).memory_bound - time.memory_bound
    assert rounding == pytest.approx(2 * 6 * TOKENS * operands)
    # Without sequence parallelism every rank has the whole residual stream.
    whole = layer(parallel={"tensor_model_parallel_size": 2})
    assert whole.memory_bound == pytest.approx(BYTES * TOKENS * (29 * H + 8 * F / 2))


@pytest.mark.parametrize(("size", "seconds_per_byte"), [(4, 1), (8, 4)])
def test_tensor_parallel_communication(size, seconds_per_byte):
    """Eight all-gathers and reduce-scatters in bf16; up to 4 ranks by NVLink, then by the network."""
    one = 2 * TOKENS * H * (size - 1) / size * seconds_per_byte
    layout = tensor_parallel(size)
    assert layer(parallel=layout).tp_comm == pytest.approx(8 * one)
    assert layer(parallel=layout, training={"recompute_granularity": "full"}).tp_comm == pytest.approx(12 * one)
    overlapped = layer(parallel=layout, assume=Assumptions(tensor_overlap=0.75))
    assert overlapped.tp_comm == pytest.approx(8 * one / 4)


@pytest.mark.parametrize(("tp", "cp", "seconds_per_byte"), [(1, 4, 1), (2, 2, 1), (2, 4, 4), (1, 8, 4)])
def test_context_parallel_communication(tp, cp, seconds_per_byte):
    """K and V in bf16 of the other ranks' tokens, three times."""
    time = layer(parallel={**tensor_parallel(tp), "context_parallel_size": cp})
    assert time.cp_comm == pytest.approx(3 * 2 * (2 * KV / tp) * TOKENS / cp * (cp - 1) * seconds_per_byte)
    assert time.gemm == pytest.approx(6 * TOKENS / cp * (ATTENTION + MLP) / tp)
    assert time.attention == pytest.approx((SCORES_FORWARD + SCORES_BACKWARD) / cp / tp)


FULL = {"recompute_granularity": "full"}
BLOCK = {**FULL, "recompute_method": "block"}
PP2 = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PP2, "virtual_pipeline_model_parallel_size": 3}
# Six layers. What is repeated of each of them on average: attention's GEMMs, its products, the MLP.
RECOMPUTE = {
    "none": ({}, {"recompute_granularity": "none", "recompute_modules": ("core_attn", "mlp")}, 0, 0, 0),
    "full": ({}, {**FULL, "recompute_modules": ()}, 1, 1, 1),
    "uniform, in units of 2": ({}, {**FULL, "recompute_num_layers": 2}, 1, 1, 1),
    "1 of 6": ({}, BLOCK, 1 / 6, 1 / 6, 1 / 6),
    "1 of a stage's 3": (PP2, BLOCK, 1 / 3, 1 / 3, 1 / 3),
    "2 of a stage's 3": (PP2, {**BLOCK, "recompute_num_layers": 2}, 2 / 3, 2 / 3, 2 / 3),
    "1 of each chunk's 1": (VIRTUAL, BLOCK, 1, 1, 1),
    "more layers than there are": (PP2, {**BLOCK, "recompute_num_layers": 5}, 1, 1, 1),
    "core attention": ({}, {"recompute_granularity": "selective"}, 0, 1, 0),
    "MLP": ({}, {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}, 0, 0, 1),
    "experts": ({}, {"recompute_granularity": "selective", "recompute_modules": ("moe",)}, 0, 0, 1),
}


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recompute_repeats_the_forward_pass(name):
    """2 FLOPs a parameter and token, the forward products, and a third of the memory-bound passes."""
    parallel, training, attention, products, mlp = RECOMPUTE[name]
    time = layer(parallel=parallel, training=training)
    assert time.gemm == pytest.approx(TOKENS * ((6 + 2 * attention) * ATTENTION + (6 + 2 * mlp) * MLP))
    assert time.attention == pytest.approx((1 + products) * SCORES_FORWARD + SCORES_BACKWARD)
    assert time.memory_bound == pytest.approx(BYTES * TOKENS * (29 * H + 8 * F) * (1 + attention / 3))


def test_parts_of_an_moe_layer():
    time = layer(MOE)
    assert time.gemm == pytest.approx(6 * TOKENS * (ATTENTION + TOPK * EXPERT + SHARED_EXPERT))
    assert time.memory_bound == pytest.approx(BYTES * TOKENS * (29 * H + TOPK * (8 * WIDTH + 12 * H) + 8 * SHARED))
    assert time.ep_comm == 0
    alone = layer(MOE, model={"moe_shared_expert_intermediate_size": None})
    assert alone.gemm == pytest.approx(6 * TOKENS * (ATTENTION + TOPK * EXPERT))


def test_operands_of_routed_rows_are_rounded_as_well():
    """Without a shared expert: inputs of a routed row are H and its width, gradients twice the width and H."""
    alone = {"moe_shared_expert_intermediate_size": None}
    rounding = layer(MOE, model=alone, fp8=True).memory_bound - layer(MOE, model=alone).memory_bound
    operands = (H + Q) + (Q + 2 * KV + H) + TOPK * (H + WIDTH + 2 * WIDTH + H)
    assert rounding == pytest.approx(2 * 6 * TOKENS * operands)


@pytest.mark.parametrize(("etp", "rows"), [(None, 1), (1, 1 / 2)])
def test_tensor_parallel_ranks_share_experts(etp, rows):
    """Under TP 2 a rank computes half of each expert for all rows (ETP 2), or whole experts for its half of them."""
    time = layer(MOE, parallel={**tensor_parallel(2), "expert_tensor_parallel_size": etp})
    width = WIDTH / 2 if etp is None else WIDTH
    assert time.gemm == pytest.approx(6 * TOKENS * (ATTENTION + TOPK * EXPERT + SHARED_EXPERT) / 2)
    assert time.memory_bound == pytest.approx(
        BYTES * TOKENS * (29 * H / 2 + rows * TOPK * (8 * width + 12 * H) + 8 * SHARED / 2)
    )


def test_imbalance_means_more_rows_for_the_busiest_rank():
    time = layer(MOE, assume=Assumptions(imbalance=1.5))
    assert time.gemm == pytest.approx(6 * TOKENS * (ATTENTION + 1.5 * TOPK * EXPERT + SHARED_EXPERT))


@pytest.mark.parametrize(("config", "ep", "matrices"), [(DENSE, 1, 4), (MOE, 1, 4 + 2 * EXPERTS), (MOE, 4, 4 + 4)])
def test_a_launch_for_each_gemm(config, ep, matrices):
    """Three GEMMs for each matrix: two of attention, two of an MLP, two of each expert on the rank."""
    slow = replace(DEVICE, bf16=rate(1e30, launch_s=1.0))
    assert layer(config, slow, parallel={"expert_model_parallel_size": ep}).gemm == pytest.approx(3 * matrices)


# Expert-parallel size, expert tensor size, and seconds per byte of all routed rows on the slower link: NVLink for the
# share that goes to other members in the node, the network at a quarter of its rate for the share of other nodes.
EXCHANGE = {
    "one node": (4, 1, 3 / 4),
    "two nodes, 4 members in each": (8, 1, 4 * 1 / 2),
    "four nodes, 2 members in each": (8, 2, 4 * 3 / 4),
    "one node, 2 of its 4 GPUs": (2, 2, 1 / 2),
    "eight nodes, 1 member in each": (8, 8, 4 * 7 / 8),
}


@pytest.mark.parametrize("name", EXCHANGE)
def test_expert_parallel_communication(name):
    """A routed row in bf16 goes to its experts and back, in the forward and in the backward pass."""
    ep, etp, part = EXCHANGE[name]
    layout = {**tensor_parallel(etp), "expert_model_parallel_size": ep}
    assert layer(MOE, parallel=layout).ep_comm == pytest.approx(4 * 2 * H * TOKENS * TOPK * part)
    skewed = layer(MOE, parallel=layout, assume=Assumptions(imbalance=1.5)).ep_comm
    assert skewed == pytest.approx(1.5 * 4 * 2 * H * TOKENS * TOPK * part)


def test_the_slower_of_both_links_counts():
    """Two nodes of 4: 3/4 of the rows inside the node by NVLink, half of them by a network that is twice as fast."""
    fast = replace(DEVICE, network_gb_s=2e-9)
    time = layer(MOE, fast, parallel={"expert_model_parallel_size": 8})
    assert time.ep_comm == pytest.approx(4 * 2 * H * TOKENS * TOPK * 3 / 4)


@pytest.mark.parametrize(
    ("topk", "tp", "rows"),
    [(6, 1, TOKENS * 3), (6, 2, TOKENS / 2 * 3), (2, 1, TOKENS * 2 * 3 / 4)],
    ids=["once per node", "once per node, of half the tokens", "fewer experts than nodes"],
)
def test_deduplicated_rows_go_to_each_other_node_once(topk, tp, rows):
    layout = {**tensor_parallel(tp), "expert_model_parallel_size": 16, "expert_tensor_parallel_size": 1}
    model = {"moe_router_topk": topk, "num_moe_experts": 16}
    time = layer(MOE, parallel=layout, model=model, assume=Assumptions(deduplicated=True))
    assert time.ep_comm == pytest.approx(4 * 2 * H * rows * 4)


def test_a_device_waits_for_a_slow_host():
    """1e9 seconds to launch a layer, and 1e8 for each of the 4 experts of a rank under EP 2."""
    slow = replace(DEVICE, host_us_per_layer=1e15, host_us_per_expert=1e14)
    assert layer(device=slow).total == pytest.approx(1e9)
    time = layer(MOE, slow, parallel={"expert_model_parallel_size": 2})
    assert time.total == pytest.approx(1.4e9)
    assert time.gemm == layer(MOE).gemm  # only the waiting is longer
    assert layer(device=replace(slow, host_us_per_layer=1.0)) == layer()
