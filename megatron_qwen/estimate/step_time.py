"""Time of an optimizer step, from the products, attention, memory traffic and messages of every rank.

A pipeline stage takes its layers' time for each micro-batch; the slowest stage sets the pace, and the others wait for
(p - 1) / v micro-batches (Narayanan et al., arXiv 2104.04473, section 2.2). Messages that megatron-core hides behind
compute are counted for what does not fit behind it.
"""

from dataclasses import dataclass

from megatron_qwen.config.pipeline import layers_per_stage
from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.hardware import Hardware, ProductRate
from megatron_qwen.estimate.memory import parameters_per_rank

# Passes over [tokens, hidden] of norms, residual sums and RoPE, forward and backward; over [tokens, ffn] of SwiGLU.
_HIDDEN_PASSES, _FFN_PASSES = 29.0, 8.0
# Share of a copy's speed that such kernels reach: from the profile of a 7B's step on an H200.
_TRAFFIC_SHARE = 0.5
# Bytes an operand of an FP8 product takes to be rounded: read twice, written in both orders.
_ROUNDING_BYTES = 6.0
# Adam: main weights, moments, gradients, weights, and the norm and clipping of gradients, a parameter.
_OPTIMIZER_BYTES = 40.0
# Share of a micro-batch's time that gradient and parameter messages hide behind, half each; chosen, not measured.
_OVERLAP = 0.7
# Share of the interleaved schedule's sends that compute does not hide; chosen, not measured.
_SENDS_EXPOSED = 0.25


@dataclass(frozen=True)
class Assumptions:
    """What a prediction cannot read off a configuration.

    Args:
        imbalance: routed tokens of the busiest expert rank over the mean; 1 is forced balance.
        deduplicated: whether a routed token crosses to another node once, whatever the number of its experts there
            (DeepEP, HybridEP), or once an expert (all-to-all).
        tensor_overlap: share of tensor-parallel messages that hide behind products.
        power: share of its rated power that the device may draw; products and attention go with it.
        achieved: share of the ceilings that a step reaches: kernels that are not counted, gaps, clocks. The default
            is what six steps on one H200 reached (``mq bench predictions``); ``mq plan --calibrate`` fits another.
    """

    imbalance: float = 1.0
    deduplicated: bool = False
    tensor_overlap: float = 0.0
    power: float = 1.0
    achieved: float = 0.98


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part, on the busiest rank.

    Args:
        products: matrix products, the loss's too.
        attention: scores and values.
        traffic: norms, activations, residuals, rounding to FP8, the loss.
        tensor: messages of tensor, context and pipeline parallelism.
        experts: messages of expert parallelism.
        bubble: waiting for the pipeline.
        data: messages of data parallelism that nothing hides.
        optimizer: the update.
        tokens: of the step.
    """

    products: float
    attention: float
    traffic: float
    tensor: float
    experts: float
    bubble: float
    data: float
    optimizer: float
    tokens: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(
            (
                self.products,
                self.attention,
                self.traffic,
                self.tensor,
                self.experts,
                self.bubble,
                self.data,
                self.optimizer,
            )
        )


@dataclass(frozen=True)
class _Micro:
    """Seconds of a micro-batch's forward and backward pass on a stage."""

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    tensor: float = 0.0
    experts: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.traffic + self.tensor + self.experts

    def __add__(self, other: "_Micro") -> "_Micro":
        return _Micro(
            self.products + other.products,
            self.attention + other.attention,
            self.traffic + other.traffic,
            self.tensor + other.tensor,
            self.experts + other.experts,
        )

    def times(self, factor: float) -> "_Micro":
        return _Micro(
            self.products * factor,
            self.attention * factor,
            self.traffic * factor,
            self.tensor * factor,
            self.experts * factor,
        )


def step_time(
    config: RunConfig, *, device: Hardware, world_size: int, assumptions: Assumptions | None = None
) -> StepTime:
    """Predicts a step.

    Args:
        config: a legal configuration.
        device: what it runs on.
        world_size: ranks.
        assumptions: what the configuration does not say.
    """
    assume = assumptions or Assumptions()
    parallel, training = config.parallel, config.training
    stages = layers_per_stage(config.model.num_layers, parallel)
    data_ranks = max(1, world_size // parallel.model_parallel_size)
    micro_batches = max(1, training.global_batch_size // (training.micro_batch_size * data_ranks))
    alike = {index: stages[index] for index in {0, len(stages) // 2, len(stages) - 1}}  # those between are alike
    per_stage = [_stage(config, device, index, layers, assume) for index, layers in alike.items()]
    slowest = max(per_stage, key=lambda stage: stage.total).times(1 / assume.achieved)
    whole = slowest.times(micro_batches)
    bubble = (len(stages) - 1) / parallel.virtual_stages * slowest.total
    stage_ranks = max(1, world_size // parallel.pipeline_model_parallel_size)
    dense, experts = parameters_per_rank(config, stage=0)
    grid = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    shards = max(1, stage_ranks // parallel.tensor_model_parallel_size), max(1, stage_ranks // grid)
    sent = dense * (shards[0] - 1) / shards[0], experts * (shards[1] - 1) / shards[1]
    neighbours = parallel.tensor_model_parallel_size, grid
    links = [_data_link(device, count, stride) for count, stride in zip(shards, neighbours, strict=True)]
    scalars = sum(part / link for part, link in zip(sent, links, strict=True))
    reduce = (4.0 if config.precision.grad_reduce_in_fp32 else 2.0) * scalars
    gather = 2.0 * scalars
    behind = _OVERLAP * slowest.total / 2
    exposed = max(0.0, reduce - (behind if parallel.overlap_grad_reduce else 0.0))
    exposed += max(0.0, gather - (behind if parallel.overlap_param_gather else 0.0))
    return StepTime(
        products=whole.products,
        attention=whole.attention,
        traffic=whole.traffic,
        tensor=whole.tensor,
        experts=whole.experts,
        bubble=bubble,
        data=exposed,
        optimizer=(dense / shards[0] + experts / shards[1]) * _OPTIMIZER_BYTES / (device.memory_gb_s * 1e9),
        tokens=training.global_batch_size * config.data.seq_length,
    )


def _link(device: Hardware, ranks: int) -> float:
    """Bytes a second of a group whose ranks are neighbours."""
    return 1e9 * (device.nvlink_gb_s if ranks <= device.devices_per_node else device.network_gb_s)


def _data_link(device: Hardware, ranks: int, stride: int) -> float:
    """Bytes a second of a group whose ranks are ``stride`` apart; it has the network links of all of them on a node."""
    if ranks * stride <= device.devices_per_node:
        return 1e9 * device.nvlink_gb_s
    return 1e9 * min(device.nvlink_gb_s, device.network_gb_s * max(1, device.devices_per_node // stride))


def _stage(config: RunConfig, device: Hardware, index: int, layers: int, assume: Assumptions) -> _Micro:
    parallel, precision = config.parallel, config.precision
    last = index == parallel.pipeline_model_parallel_size - 1
    layer = _layer(config, device, assume, fp8=precision.fp8 is not None)
    plain = _layer(config, device, assume, fp8=False)
    outer = 0
    if precision.fp8 is not None and precision.fp8 != "delayed" and precision.first_last_layers_bf16:
        outer = (precision.num_layers_at_start_in_bf16 if index == 0 else 0) + (
            precision.num_layers_at_end_in_bf16 if last else 0
        )
    outer = min(outer, layers)
    whole = layer.times(layers - outer) + plain.times(outer) + _sends(config, device)
    return whole + _loss(config, device, assume) if last else whole


def _sends(config: RunConfig, device: Hardware) -> _Micro:
    """What goes to and from the neighbouring pipeline ranks, for every virtual stage, forward and backward."""
    parallel, training = config.parallel, config.training
    if parallel.pipeline_model_parallel_size == 1:
        return _Micro()
    tokens = training.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    sent = 2 * parallel.virtual_stages * 2.0 * tokens * config.model.hidden_size / split
    hidden = parallel.virtual_stages > 1 and parallel.overlap_p2p_comm
    return _Micro(tensor=sent / (device.network_gb_s * 1e9) * (_SENDS_EXPOSED if hidden else 1.0))


def _layer(config: RunConfig, device: Hardware, assume: Assumptions, *, fp8: bool) -> _Micro:
    """Forward and backward of a layer, with what full recompute adds."""
    model, parallel, training = config.model, config.parallel, config.training
    tp = parallel.tensor_model_parallel_size
    tokens = training.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    h, q = model.hidden_size, model.num_attention_heads * model.head_dim
    kv = model.num_query_groups * model.head_dim
    rate = device.fp8 if fp8 and device.fp8 is not None else device.bf16
    full = training.recompute_granularity == "full"
    partly = _recomputed_share(config) if full else 0.0
    selected = set(training.recompute_modules) if training.recompute_granularity == "selective" else set()
    again = partly
    again_attention = 1.0 if "core_attn" in selected else partly
    again_mlp = 1.0 if {"mlp", "moe"} & selected else partly

    def product(m: float, inner: float, outer: float, count: float = 1.0, *, recomputed: float = again) -> float:
        return count * _three(rate, device, m, inner, outer, recomputed) / assume.power

    products = product(tokens, h, (q + 2 * kv) / tp) + product(tokens, q / tp, h)
    operands = (h + q / tp) + (q + 2 * kv) / tp + h  # elements a token that FP8 rounds
    traffic = _HIDDEN_PASSES * h / (tp if parallel.sequence_parallel else 1)
    expert_messages = 0.0
    if model.num_moe_experts is None:
        f = model.ffn_hidden_size / tp
        products += product(tokens, h, 2 * f, recomputed=again_mlp) + product(tokens, f, h, recomputed=again_mlp)
        operands += h + f + 2 * f + h
        traffic += _FFN_PASSES * f
    else:
        ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
        routed = tokens * model.moe_router_topk * assume.imbalance / (tp if parallel.sequence_parallel else 1) * etp
        local = model.num_moe_experts / ep
        width = (model.moe_ffn_hidden_size or 0) / etp
        rows = routed / local
        products += product(rows, h, 2 * width, local, recomputed=again_mlp)
        products += product(rows, width, h, local, recomputed=again_mlp)
        per_token = routed / tokens
        operands += per_token * (h + width + 2 * width + h)
        # Routed rows are permuted, weighted and brought back, forward and backward.
        traffic += per_token * (_FFN_PASSES * width + 12 * h)
        if model.moe_shared_expert_intermediate_size:
            f = model.moe_shared_expert_intermediate_size / tp
            products += product(tokens, h, 2 * f, recomputed=again_mlp) + product(tokens, f, h, recomputed=again_mlp)
            traffic += _FFN_PASSES * f
        if ep > 1:
            expert_messages = 4 * _exchange(config, device, tokens, routed, deduplicated=assume.deduplicated)
    half = model.num_attention_heads / tp * model.head_dim * config.data.seq_length / 2
    forward = 4.0 * tokens * half / (device.attention_tflops[0] * 1e12)
    backward = 10.0 * tokens * half / (device.attention_tflops[1] * 1e12)
    narrow = 0.6 if model.head_dim <= 64 else 1.0
    attention = (forward * (1 + again_attention) + backward) / narrow / assume.power
    moved = traffic * 2.0 * (1 + again / 3) + (_ROUNDING_BYTES * operands if fp8 else 0.0)
    messages = 0.0
    if tp > 1:  # gathers and reduce-scatters around both halves, forward and backward
        exposed = 1 - assume.tensor_overlap
        messages += exposed * (8 + 4 * again) * 2.0 * tokens * h * (tp - 1) / tp / _link(device, tp)
    if parallel.context_parallel_size > 1:
        cp = parallel.context_parallel_size
        messages += 3 * 2.0 * 2 * kv / tp * tokens * (cp - 1) / _link(device, tp * cp)
    seconds = moved * tokens / (_TRAFFIC_SHARE * device.memory_gb_s * 1e9)
    whole = _Micro(products, attention, seconds, messages, expert_messages)
    local_experts = (model.num_moe_experts or 0) / parallel.expert_model_parallel_size
    host = device.host_us_per_layer + device.host_us_per_expert * local_experts
    waiting = max(0.0, host * 1e-6 - whole.total)
    return whole + _Micro(traffic=waiting)


def _exchange(config: RunConfig, device: Hardware, tokens: float, routed: float, *, deduplicated: bool) -> float:
    """Seconds in which routed rows go to their experts, or come back."""
    parallel, row = config.parallel, 2.0 * config.model.hidden_size
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    # Ranks of an expert group are neighbours but for the tensor ranks of an expert.
    inside = min(ep, max(1, device.devices_per_node // parallel.expert_tensor_size))
    near = routed * row * (inside - 1) / inside / (device.nvlink_gb_s * 1e9)
    if ep == inside:
        return near
    nodes = ep // inside
    rows = routed * (nodes - 1) / nodes
    if deduplicated:
        rows = min(rows, tokens / (tp if parallel.sequence_parallel else 1) * (nodes - 1))
    return max(near, rows * row / (device.network_gb_s * 1e9))


def _recomputed_share(config: RunConfig) -> float:
    """Layers that full recompute takes: all, or the first ones of every stage."""
    parallel, training = config.parallel, config.training
    if training.recompute_method == "uniform":
        return 1.0
    layers = config.model.num_layers / parallel.pipeline_model_parallel_size
    return min(1.0, training.recompute_num_layers * parallel.virtual_stages / layers)


def _three(rate: ProductRate, device: Hardware, m: float, inner: float, outer: float, again: float) -> float:
    """Output, gradient of the input, and gradient of the weight added to fp32."""
    memory = device.memory_gb_s
    forward = rate.seconds(m, outer, inner, memory_gb_s=memory)
    backward = rate.seconds(m, inner, outer, memory_gb_s=memory)
    weight = rate.seconds(inner, outer, m, memory_gb_s=memory, result_bytes=8.0)
    return forward * (1 + again) + backward + weight


def _loss(config: RunConfig, device: Hardware, assume: Assumptions) -> _Micro:
    model, parallel, training = config.model, config.parallel, config.training
    tokens = training.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    rows = model.vocab_size / parallel.tensor_model_parallel_size
    products = _three(device.bf16, device, tokens, model.hidden_size, rows, 0.0) / assume.power
    moved = 8.0 * tokens * rows + 20.0 * rows * model.hidden_size
    return _Micro(products=products, traffic=moved / (device.memory_gb_s * 1e9))
