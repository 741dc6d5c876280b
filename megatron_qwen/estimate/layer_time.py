"""Time of a micro-batch in one layer, forward and backward: the derivation of each term of ``step_time.py``."""

from dataclasses import dataclass

from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.adapters import products
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.hardware import GemmRate, Hardware

# Passes of the memory-bound operations of a layer, forward + backward: one is a read or a write of every element in
# bf16. Over [tokens, hidden]: two norms, 2 x (2 + 3); two residual additions, 2 x (3 + 3); RoPE of the queries, 2 + 2.
# That is 26. 29 was set by hand; what the other three stand for is not recorded.
_HIDDEN_PASSES = 29.0
# Over [tokens, ffn], SwiGLU: reads gate and up and writes the product (3); reads both and a gradient, writes two (5).
_FFN_PASSES = 8.0
# Over [routed tokens, hidden]: permutation, weighting and the inverse permutation, 3 x (2 + 2).
_ROUTED_PASSES = 12.0
# Over [tokens, outputs] of a layer with an adapter, by counting: its product is put beside those of other adapters of
# the layer (2), and added (3). Not measured.
_ADAPTER_PASSES = 5.0
# Fraction of the copy bandwidth that memory-bound kernels reach: from the profile of a 7B's step on an H200.
_BANDWIDTH_SHARE = 0.5
# Bytes to round one operand element of an FP8 GEMM: bf16 is read twice (amax, cast: 4), and one byte is written in row
# and in column order (2), because cuBLAS takes FP8 operands in one order only.
_ROUNDING_BYTES = 6.0
# Kernels of attention with a head dimension up to 64 reach this fraction of the rate at 128.
_NARROW_HEAD_RATE = 0.6


@dataclass(frozen=True)
class MicroBatchTime:
    """Seconds of the forward and backward pass of one micro-batch on a stage."""

    gemm: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    tp_comm: float = 0.0
    cp_comm: float = 0.0
    pp_comm: float = 0.0
    ep_comm: float = 0.0

    @property
    def parts(self) -> tuple[float, ...]:
        """Seconds of every part, in the order of the fields."""
        return (self.gemm, self.attention, self.memory_bound, self.tp_comm, self.cp_comm, self.pp_comm, self.ep_comm)

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts)

    def __add__(self, other: "MicroBatchTime") -> "MicroBatchTime":
        return MicroBatchTime(*(mine + theirs for mine, theirs in zip(self.parts, other.parts, strict=True)))

    def times(self, factor: float) -> "MicroBatchTime":
        """Every part multiplied by a factor."""
        return MicroBatchTime(*(part * factor for part in self.parts))


def _link(device: Hardware, ranks: int) -> float:
    """Bytes per second of a group of consecutive ranks: NVLink inside a node, else the network."""
    return 1e9 * (device.nvlink_gb_s if ranks <= device.devices_per_node else device.network_gb_s)


@dataclass(frozen=True)
class _Recompute:
    """How often the backward pass repeats the forward of each part of a layer: a fraction of all layers, 0 to 1."""

    layer: float
    attention: float
    mlp: float


def _recompute(config: RunConfig) -> _Recompute:
    training, parallel = config.training, config.parallel
    whole = 0.0
    if training.recompute_granularity == "full":
        whole = 1.0
        if training.recompute_method == "block":  # the first layers of every chunk
            layers = config.model.num_layers / parallel.pipeline_model_parallel_size
            whole = min(1.0, training.recompute_num_layers * parallel.virtual_stages / layers)
    selected = set(training.recompute_modules) if training.recompute_granularity == "selective" else set()
    return _Recompute(
        layer=whole,
        attention=1.0 if "core_attn" in selected else whole,
        mlp=1.0 if {"mlp", "moe"} & selected else whole,
    )


@dataclass(frozen=True)
class _Mlp:
    """The MLP of a layer: seconds of its GEMMs and of expert-parallel communication, and per token elements that FP8
    rounds and memory-bound passes move."""

    gemm: float
    ep_comm: float
    rounded: float
    moved: float


def layer_time(config: RunConfig, device: Hardware, assume: Assumptions, *, fp8: bool) -> MicroBatchTime:
    """Forward and backward of one layer, with the forward passes that recompute repeats."""
    model, parallel, training = config.model, config.parallel, config.training
    tp = parallel.tensor_model_parallel_size
    tokens = training.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    h, q = model.hidden_size, model.num_attention_heads * model.head_dim
    kv = model.num_query_groups * model.head_dim
    rate = device.fp8 if fp8 and device.fp8 is not None else device.bf16
    again = _recompute(config)
    mlp = _mlp(config, device, assume, rate, tokens)
    # QKV projection [tokens, h] x [h, (q + 2 kv) / TP], output projection [tokens, q / TP] x [q / TP, h].
    trained = config.lora.rank is None
    gemm = linear_time(rate, device, tokens, h, (q + 2 * kv) / tp, again.layer, trained=trained)
    gemm += linear_time(rate, device, tokens, q / tp, h, again.layer, trained=trained)
    adapters = _adapters(config, device, assume, tokens, again.layer)
    gemm = gemm / assume.power + mlp.gemm + adapters.gemm
    # Each linear layer rounds its input and the gradient of its output.
    rounded = (h + q / tp) + (q + 2 * kv) / tp + h + mlp.rounded
    moved = _HIDDEN_PASSES * h / (tp if parallel.sequence_parallel else 1) + mlp.moved
    # 2 bytes a pass; of forward and backward the forward, about a third of the passes, is repeated by recompute.
    memory_bytes = moved * 2.0 * (1 + again.layer / 3) + (_ROUNDING_BYTES * rounded if fp8 else 0.0)
    whole = MicroBatchTime(
        gemm=gemm,
        attention=_attention(config, device, assume, tokens, again.attention),
        memory_bound=memory_bytes * tokens / (_BANDWIDTH_SHARE * device.memory_gb_s * 1e9) + adapters.memory_bound,
        tp_comm=_tp_comm(config, device, assume, tokens, again.layer),
        cp_comm=_cp_comm(config, device, tokens),
        ep_comm=mlp.ep_comm,
    )
    # A GPU waits where the host needs longer to launch a layer's kernels than the GPU to run them.
    local_experts = (model.num_moe_experts or 0) / parallel.expert_model_parallel_size
    host_us = device.host_us_per_layer + device.host_us_per_expert * local_experts
    return whole + MicroBatchTime(memory_bound=max(0.0, host_us * 1e-6 - whole.total))


def _mlp(config: RunConfig, device: Hardware, assume: Assumptions, rate: GemmRate, tokens: float) -> _Mlp:
    """The SwiGLU MLP, or routed and shared experts. Gate and up are one GEMM to 2 f, down is one from f."""
    model, parallel = config.model, config.parallel
    tp, h, again = parallel.tensor_model_parallel_size, model.hidden_size, _recompute(config).mlp

    trained = config.lora.rank is None

    def swiglu(rows: float, f: float) -> float:
        both = linear_time(rate, device, rows, h, 2 * f, again, trained=trained)
        both += linear_time(rate, device, rows, f, h, again, trained=trained)
        return both / assume.power

    if model.num_moe_experts is None:
        f = model.ffn_hidden_size / tp
        return _Mlp(gemm=swiglu(tokens, f), ep_comm=0.0, rounded=h + f + 2 * f + h, moved=_FFN_PASSES * f)
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    # Rows that a rank sends to experts; an expert that is split over ETP ranks needs each row on all of them.
    routed = tokens * model.moe_router_topk * assume.imbalance / (tp if parallel.sequence_parallel else 1) * etp
    local = model.num_moe_experts / ep
    width = (model.moe_ffn_hidden_size or 0) / etp
    gemm = local * swiglu(routed / local, width)
    per_token = routed / tokens
    rounded = per_token * (h + width + 2 * width + h)
    moved = per_token * (_FFN_PASSES * width + _ROUTED_PASSES * h)
    if model.moe_shared_expert_intermediate_size:
        f = model.moe_shared_expert_intermediate_size / tp
        gemm += swiglu(tokens, f)
        moved += _FFN_PASSES * f
    # Dispatch and combine, in the forward and in the backward pass.
    ep_comm = 4 * _exchange(config, device, tokens, routed, deduplicated=assume.deduplicated)
    return _Mlp(gemm, ep_comm, rounded, moved)


def _adapters(config: RunConfig, device: Hardware, assume: Assumptions, tokens: float, again: float) -> MicroBatchTime:
    """The products of a layer's adapters, always in bf16, and the addition of each to its layer's output."""
    gemm = moved = 0.0
    parallel, model = config.parallel, config.model
    for target, inputs, outputs in products(config):
        rank, groups, rows = float(config.lora.rank or 0), 1.0, tokens
        if target.per_expert:
            groups = (model.num_moe_experts or 0) / parallel.expert_model_parallel_size
            split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
            rows = tokens * model.moe_router_topk * assume.imbalance / split / groups
        gemm += groups * linear_time(device.bf16, device, rows, inputs, rank, again)
        gemm += groups * linear_time(device.bf16, device, rows, rank, outputs, again)
        moved += groups * rows * outputs * _ADAPTER_PASSES
    seconds = moved * 2.0 / (_BANDWIDTH_SHARE * device.memory_gb_s * 1e9)
    return MicroBatchTime(gemm=gemm / assume.power, memory_bound=seconds)


def _attention(config: RunConfig, device: Hardware, assume: Assumptions, tokens: float, again: float) -> float:
    """Seconds of causal attention.

    A query meets seq / 2 keys on average. Per query, key and channel, the forward pass has two GEMMs (scores, values)
    of 2 FLOPs each; the backward pass has five (it recomputes the scores, then the gradients of values, probabilities,
    queries and keys): Dao 2023, arXiv 2307.08691, section 3.1.
    """
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    pairs = tokens * (model.num_attention_heads / tp * model.head_dim * config.data.seq_length / 2)
    forward = 4.0 * pairs / (device.attention_tflops[0] * 1e12)
    backward = 10.0 * pairs / (device.attention_tflops[1] * 1e12)
    narrow = _NARROW_HEAD_RATE if model.head_dim <= 64 else 1.0
    return (forward * (1 + again) + backward) / narrow / assume.power


def _tp_comm(config: RunConfig, device: Hardware, assume: Assumptions, tokens: float, again: float) -> float:
    """Exposed seconds of tensor-parallel communication.

    Attention and MLP each have an all-gather before and a reduce-scatter after (or the all-reduce that equals both), in
    the forward and in the backward pass: 8 operations, and the 4 of the forward once more with full recompute
    (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2). Each sends (TP - 1) / TP of [tokens, hidden] in bf16.
    """
    tp = config.parallel.tensor_model_parallel_size
    if tp == 1:
        return 0.0
    sent = (8 + 4 * again) * 2.0 * tokens * config.model.hidden_size * (tp - 1) / tp
    return (1 - assume.tensor_overlap) * sent / _link(device, tp)


def _cp_comm(config: RunConfig, device: Hardware, tokens: float) -> float:
    """Seconds of context-parallel communication: K and V of the other ranks, in bf16.

    Three times: gathered in the forward pass, gathered again in the backward pass, and their gradients sent back.
    """
    model, parallel = config.model, config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp == 1:
        return 0.0
    kv = model.num_query_groups * model.head_dim
    return 3 * 2.0 * 2 * kv / tp * tokens * (cp - 1) / _link(device, tp * cp)


def _exchange(config: RunConfig, device: Hardware, tokens: float, routed: float, *, deduplicated: bool) -> float:
    """Seconds of one all-to-all of routed rows, to their experts or back.

    Links inside the node and to other nodes work at the same time, so the slower of the two counts.
    """
    parallel, row = config.parallel, 2.0 * config.model.hidden_size  # bf16
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    # Ranks of an expert-parallel group are ETP apart, so that many fewer of them share a node.
    inside = min(ep, max(1, device.devices_per_node // parallel.expert_tensor_size))
    near = routed * row * (inside - 1) / inside / (device.nvlink_gb_s * 1e9)
    if ep == inside:
        return near
    nodes = ep // inside
    rows = routed * (nodes - 1) / nodes
    if deduplicated:
        rows = min(rows, tokens / (tp if parallel.sequence_parallel else 1) * (nodes - 1))
    return max(near, rows * row / (device.network_gb_s * 1e9))


def linear_time(
    rate: GemmRate, device: Hardware, rows: float, inner: float, outer: float, again: float, *, trained: bool = True
) -> float:
    """Seconds of a linear layer's three GEMMs: output, input gradient, and weight gradient accumulated in fp32.

    Args:
        rate: of GEMMs in the layer's format.
        device: for its memory bandwidth.
        rows: tokens.
        inner: input features.
        outer: output features.
        again: repetitions of the forward GEMM by recompute.
        trained: whether there is a weight gradient.
    """
    memory = device.memory_gb_s
    forward = rate.seconds(rows, outer, inner, memory_gb_s=memory)
    input_gradient = rate.seconds(rows, inner, outer, memory_gb_s=memory)
    if not trained:
        return forward * (1 + again) + input_gradient
    # The fp32 sum is read and written: 8 bytes an element.
    weight_gradient = rate.seconds(inner, outer, rows, memory_gb_s=memory, result_bytes=8.0)
    return forward * (1 + again) + input_gradient + weight_gradient
