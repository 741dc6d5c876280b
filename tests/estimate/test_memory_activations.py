"""Activations of a rank against scalars counted by hand, as Korthikanti et al. 2022 (arXiv 2205.05198) count them.

Theirs is 34 bytes per token and hidden channel for a layer of GPT in 16 bits; a layer here has RMSNorms, SwiGLU and
grouped-query attention, and its attention keeps no scores.
"""

import pytest

from megatron_qwen.estimate.memory import memory_per_stage
from tests.estimate.by_hand import (
    DENSE,
    EXPERTS,
    KV,
    LAYERS,
    MOE,
    SHARED,
    TOKENS,
    TOPK,
    WIDTH,
    F,
    H,
    Q,
    changed,
    tensor_parallel,
)

TP2, CP2 = tensor_parallel(2), {"context_parallel_size": 2}
# Scalars by token. A layer keeps the inputs and outputs of both norms; Q, K, V and attention's output; of SwiGLU gate,
# up and product. torch's attention keeps its output once more, in another layout. The backward pass of a layer needs
# gradients of what SwiGLU kept, and of the inputs of two blocks.
NORMS, ATTENTION, SWIGLU = 4 * H, 2 * Q + 2 * KV, 3 * F
DENSE_LAYER, TORCH_LAYER = NORMS + ATTENTION + SWIGLU, NORMS + ATTENTION + Q + SWIGLU
WORKING = 3 * F + 2 * H


def selective(*modules):
    return {"training": {"recompute_granularity": "selective", "recompute_modules": modules}}


def per_token(config, *, ranks=1, backend="te", gpu=True, **sections) -> list[float]:
    """Bytes of activations on each stage, by token that a rank has."""
    config = changed(config, **sections)
    stages = memory_per_stage(config, world_size=ranks, backend=backend, gpu=gpu)
    tokens = TOKENS / config.parallel.context_parallel_size
    return [stage.activations / tokens for stage in stages]


# What each of six layers keeps, and what the backward pass of one needs; in bf16, so two bytes each.
CASES = {
    "te": ("te", {}, DENSE_LAYER, WORKING),
    "torch": ("torch", {}, TORCH_LAYER, WORKING),
    "te, TP": ("te", {"parallel": TP2}, DENSE_LAYER / 2, 3 * F / 2 + 2 * H),
    "te, TP without SP": (
        "te",
        {"parallel": {"tensor_model_parallel_size": 2}},
        NORMS + (ATTENTION + SWIGLU) / 2,
        3 * F / 2 + 2 * H,
    ),
    "torch, TP": ("torch", {"parallel": TP2}, TORCH_LAYER / 2, 3 * F / 2 + 2 * H),
    "te, CP": ("te", {"parallel": CP2}, DENSE_LAYER, WORKING),
    # The other rank's keys and values too. The causal masks of two chunks of 8 queries, which see 5 chunks of keys
    # together, are shared by the rank's 2 x 16 tokens.
    "torch, CP": ("torch", {"parallel": CP2}, TORCH_LAYER + 2 * KV, WORKING + 5 * 8 * 8 / 32),
    "torch, TP and CP": (
        "torch",
        {"parallel": {**TP2, **CP2}},
        (TORCH_LAYER + 2 * KV) / 2,
        3 * F / 2 + 2 * H + 5 * 8 * 8 / 32,
    ),
    "te, without the MLP": ("te", selective("mlp"), NORMS + ATTENTION, WORKING),
    "te, without the experts": ("te", selective("moe"), NORMS + ATTENTION, WORKING),
    "te, core attention": ("te", selective("core_attn"), DENSE_LAYER, WORKING),
    "torch, core attention": ("torch", selective("core_attn"), DENSE_LAYER, WORKING),
    "torch, core attention, CP": (
        "torch",
        selective("core_attn") | {"parallel": CP2},
        DENSE_LAYER,
        WORKING + 5 * 8 * 8 / 32,
    ),
    "torch, core attention, TP": (
        "torch",
        selective("core_attn") | {"parallel": TP2},
        DENSE_LAYER / 2,
        3 * F / 2 + 2 * H,
    ),
    "te, none": (
        "te",
        {"training": {"recompute_granularity": "none", "recompute_modules": ("mlp", "core_attn")}},
        DENSE_LAYER,
        WORKING,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_activations_of_a_dense_model(name):
    backend, sections, kept, working = CASES[name]
    assert per_token(DENSE, backend=backend, **sections) == pytest.approx([2 * (LAYERS * kept + working)])


def test_fp32_takes_twice_as_much():
    in_fp32 = per_token(DENSE, backend="torch", precision={"dtype": "fp32"})
    assert in_fp32 == pytest.approx([4 * (LAYERS * TORCH_LAYER + WORKING)])


@pytest.mark.parametrize("parallel", [{}, TP2], ids=["one rank", "TP"])
def test_inputs_of_gemms_are_kept_in_one_byte_in_fp8(parallel):
    """Outputs of both norms, of attention and of SwiGLU."""
    (saved,) = (
        plain - in_fp8
        for plain, in_fp8 in zip(
            per_token(DENSE, parallel=parallel),
            per_token(DENSE, parallel=parallel, precision={"fp8": "tensorwise"}),
            strict=True,
        )
    )
    assert saved == pytest.approx(LAYERS * (2 * H + Q + F) / (2 if parallel else 1))
    emulated = {"fp8": "tensorwise", "emulate_fp8": True}
    assert per_token(DENSE, backend="torch", precision=emulated) == per_token(DENSE, backend="torch")


FULL = {"recompute_granularity": "full"}
BLOCK = {**FULL, "recompute_method": "block"}


@pytest.mark.parametrize(
    ("training", "inputs", "whole"),
    [
        (FULL, 6, 0),
        ({**FULL, "recompute_num_layers": 2}, 6, 0),
        (BLOCK, 1, 5),
        ({**BLOCK, "recompute_num_layers": 4}, 4, 2),
        ({**BLOCK, "recompute_num_layers": 9}, 6, 0),
    ],
)
@pytest.mark.parametrize("split", [1, 2])
def test_full_recompute_keeps_inputs_of_layers(training, inputs, whole, split):
    """And all of the layer that is being computed again."""
    working = 3 * F / split + 2 * H
    expected = 2 * ((inputs * H + whole * DENSE_LAYER + DENSE_LAYER) / split + working)
    assert per_token(DENSE, training=training, parallel=tensor_parallel(split)) == pytest.approx([expected])


PP3 = {"pipeline_model_parallel_size": 3}
INTERLEAVED = {**PP3, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(("ranks", "in_flight"), [(3, [3, 2, 1]), (6 * 3, [2, 2, 1]), (12 * 3, [1, 1, 1])])
def test_micro_batches_in_flight(ranks, in_flight):
    """1F1B: the first of p stages runs p micro-batches ahead, and no more than its 12, 2 or 1 of a step."""
    expected = [2 * (2 * count * DENSE_LAYER + WORKING) for count in in_flight]
    assert per_token(DENSE, ranks=ranks, parallel=PP3) == pytest.approx(expected)


def test_a_short_step_has_fewer_micro_batches_in_flight():
    expected = [2 * (2 * count * DENSE_LAYER + WORKING) for count in (2, 2, 1)]
    assert per_token(DENSE, ranks=3, parallel=PP3, training={"global_batch_size": 4}) == pytest.approx(expected)


@pytest.mark.parametrize(("ranks", "chunks"), [(3, [8, 6, 4]), (4 * 3, [6, 6, 4]), (99 * 3, [2, 2, 2])])
@pytest.mark.parametrize("split", [1, 2])
def test_chunks_in_flight_of_the_interleaved_schedule(ranks, chunks, split):
    """Chunks of one layer. Warm-up is 2 (p - rank - 1) + (v - 1) p chunks, as in megatron-core; then one more.

    No more than the 2 chunks of 12, 3 or 1 micro-batches. An input and a gradient of each chunk are in transit.
    """
    working = 3 * F / split + 2 * H + 2 * 2 * H / split
    expected = [2 * (count * DENSE_LAYER / split + working) for count in chunks]
    layout = INTERLEAVED | tensor_parallel(split)
    assert per_token(DENSE, ranks=ranks * split, parallel=layout) == pytest.approx(expected)


def test_chunks_in_transit_are_whole_without_sequence_parallelism():
    whole = INTERLEAVED | {"tensor_model_parallel_size": 2}
    layer, working = NORMS + (ATTENTION + SWIGLU) / 2, 3 * F / 2 + 2 * H + 2 * 2 * H
    expected = [2 * (count * layer + working) for count in (8, 6, 4)]
    assert per_token(DENSE, ranks=6, parallel=whole) == pytest.approx(expected)


def test_block_recompute_counts_the_layers_of_every_chunk():
    """Six layers a rank in two chunks of three: the first of each keeps its input only; 12 layers, p = v = 2."""
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    first, last = per_token(DENSE, ranks=2, parallel=layout, training=BLOCK, model={"num_layers": 12})
    layers, working = 2 * H + 4 * DENSE_LAYER, DENSE_LAYER + WORKING + 4 * H
    assert (first, last) == pytest.approx((2 * (5 / 2 * layers + working), 2 * (3 / 2 * layers + working)))


# A routed token's row, its SwiGLU and its result, of each of its experts; the shared expert's SwiGLU. torch recomputes
# a part of SwiGLU, keeps no result, and keeps the input of the shared expert's gate.
TE_EXPERTS = TOPK * (2 * H + 3 * WIDTH) + 3 * SHARED
TORCH_EXPERTS = TOPK * (H + 2 * WIDTH) + 3 * SHARED + H
EXPERT_GRADIENTS = EXPERTS * 3 * H * WIDTH / TOKENS  # of one layer, by token
MOE_WORKING = 3 * TOPK * WIDTH + 2 * H
EP2, ETP1 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 1}
MOE_CASES = {
    "te": ("te", {}, NORMS + ATTENTION + TE_EXPERTS, MOE_WORKING),
    "te, EP": ("te", {"parallel": EP2}, NORMS + ATTENTION + TE_EXPERTS, MOE_WORKING),
    "te, TP": ("te", {"parallel": TP2 | ETP1}, (NORMS + ATTENTION + TE_EXPERTS) / 2, 3 * TOPK * WIDTH / 2 + 2 * H),
    "te, no shared expert": (
        "te",
        {"model": {"moe_shared_expert_intermediate_size": None}},
        NORMS + ATTENTION + TE_EXPERTS - 3 * SHARED,
        MOE_WORKING,
    ),
    "te, without the experts": ("te", selective("moe"), NORMS + ATTENTION, MOE_WORKING),
    "torch": ("torch", {}, NORMS + ATTENTION + Q + TORCH_EXPERTS, MOE_WORKING + EXPERT_GRADIENTS),
    "torch, no gate": (
        "torch",
        {"model": {"moe_shared_expert_gate": False}},
        NORMS + ATTENTION + Q + TORCH_EXPERTS - H,
        MOE_WORKING + EXPERT_GRADIENTS,
    ),
    # Gradients of routed rows, before and after the all-to-all.
    "torch, EP": (
        "torch",
        {"parallel": EP2},
        NORMS + ATTENTION + Q + TORCH_EXPERTS,
        MOE_WORKING + EXPERT_GRADIENTS / 2 + 2 * TOPK * H,
    ),
    "torch, TP": (
        "torch",
        {"parallel": TP2 | ETP1},
        (NORMS + ATTENTION + Q + TORCH_EXPERTS) / 2,
        3 * TOPK * WIDTH / 2 + 2 * H + EXPERT_GRADIENTS,
    ),
    # A row is sent to both ranks of its expert.
    "torch, ETP": (
        "torch",
        {"parallel": TP2},
        (NORMS + ATTENTION + Q + TORCH_EXPERTS + TOPK * H) / 2,
        3 * TOPK * WIDTH / 2 + 2 * H + EXPERT_GRADIENTS / 2 + 2 * TOPK * H,
    ),
    # Each keeps SwiGLU's product before and after the routing weight, and the gradients of one at a time are small.
    "torch, one by one": (
        "torch",
        {"performance": {"moe_grouped_gemm": False}},
        NORMS + ATTENTION + Q + TORCH_EXPERTS + 2 * TOPK * WIDTH,
        MOE_WORKING,
    ),
    "torch, emulated FP8": (
        "torch",
        {"precision": {"fp8": "tensorwise", "emulate_fp8": True}},
        NORMS + ATTENTION + Q + TORCH_EXPERTS + 2 * TOPK * WIDTH,
        MOE_WORKING,
    ),
}


@pytest.mark.parametrize("name", MOE_CASES)
def test_activations_of_an_moe_model(name):
    backend, sections, kept, working = MOE_CASES[name]
    assert per_token(MOE, backend=backend, **sections) == pytest.approx([2 * (LAYERS * kept + working)])


def test_gradients_of_experts_are_in_the_format_of_the_model():
    in_fp32 = per_token(MOE, backend="torch", precision={"dtype": "fp32"})
    kept, working = NORMS + ATTENTION + Q + TORCH_EXPERTS, MOE_WORKING + EXPERT_GRADIENTS
    assert in_fp32 == pytest.approx([4 * (LAYERS * kept + working)])


def test_attention_keeps_probabilities_on_a_cpu_and_its_output_on_a_gpu():
    """512 queries in 8 blocks of 64, of which block n sees 64 n keys; in the backward pass only, if it is repeated."""
    long, tokens = {"data": {"seq_length": 512}}, 512 * 2
    probabilities = 4 * 64 * 64 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8) / 512
    (kept,) = memory_per_stage(changed(DENSE, **long), world_size=1, backend="torch", gpu=False)
    layer = NORMS + ATTENTION + probabilities + SWIGLU
    assert kept.activations == pytest.approx(tokens * 2 * (LAYERS * layer + WORKING))
    (on_gpu,) = memory_per_stage(changed(DENSE, **long), world_size=1, backend="torch")
    assert on_gpu.activations == pytest.approx(tokens * 2 * (LAYERS * TORCH_LAYER + WORKING))
    again = changed(DENSE, **long, **selective("core_attn"))
    (on_gpu,) = memory_per_stage(again, world_size=1, backend="torch")
    assert on_gpu.activations == pytest.approx(tokens * 2 * (LAYERS * DENSE_LAYER + WORKING))
    (repeated,) = memory_per_stage(again, world_size=1, backend="torch", gpu=False)
    assert repeated.activations == pytest.approx(tokens * 2 * (LAYERS * DENSE_LAYER + probabilities + 2 * H))


@pytest.mark.parametrize(
    ("precision", "backend"),
    [({}, "te"), ({"backend": "torch"}, "torch"), ({"fp8": "tensorwise", "emulate_fp8": True}, "torch")],
)
def test_the_backend_that_the_configuration_asks_for(precision, backend):
    config = changed(MOE, precision=precision)
    te, torch = (memory_per_stage(config, world_size=1, backend=name) for name in ("te", "torch"))
    assert te != torch
    assert memory_per_stage(config, world_size=1) == (te if backend == "te" else torch)
