"""Memory of a rank, by part and pipeline stage, before anything is built.

Weights, gradients and optimizer state are counted exactly from the layout. Activations follow the accounting of
Korthikanti et al. 2022 (arXiv 2205.05198, section 4), redone for SwiGLU, grouped-query attention and a fused attention
that stores no scores (on a CPU it may store them: cpu_attention.py). What a device needs in addition (CUDA
context, NCCL buffers, fragmentation) is a fixed allowance, not a count.
"""

from dataclasses import dataclass

from megatron_qwen.config.pipeline import layers_per_stage
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.estimate import cpu_attention
from megatron_qwen.estimate.adapters import (
    adapted_parts,
    adapters_per_rank,
    adapts_experts,
    padded_rows,
    products,
    trained_parameters,
    trained_per_rank,
    trains_output,
)

# CUDA context, NCCL buffers and fragmentation of a rank. Chosen by hand: what the allocator does not report was not
# measured (docs/performance.md, "Choosing a layout").
ALLOWANCE_GIB = 4.0
# Tokens per chunk of logits in the loss on a GPU (objectives/cross_entropy.py), and bytes per logit in bf16.
_LOSS_CHUNK_TOKENS, _LOSS_BYTES = 4096, 2
_GIB = 2.0**30


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage.

    Args:
        stage: number of the stage, from 0.
        parameters: scalars that a rank holds; a count, not bytes.
        weights: weights in the compute format.
        gradients: gradients of all of them.
        optimizer: the rank's share of main weights and moments.
        activations: activations of every micro-batch in flight.
        loss: logits of a chunk and the output matrix's gradient; 0 but on the last stage.
    """

    stage: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def state_gib(self) -> float:
        """GiB of weights, gradients and optimizer state, counted exactly."""
        return (self.weights + self.gradients + self.optimizer) / _GIB

    @property
    def total_gib(self) -> float:
        """GiB of everything, with the allowance."""
        return self.state_gib + (self.activations + self.loss) / _GIB + ALLOWANCE_GIB


def memory_per_stage(
    config: RunConfig, *, world_size: int, backend: str | None = None, gpu: bool = True
) -> list[StageMemory]:
    """Memory of a rank of every pipeline stage.

    Args:
        config: a legal configuration.
        world_size: ranks of the run; the optimizer is shared by the data-parallel ones.
        backend: ``te`` or ``torch``, which keep different things for the backward pass; None is ``te`` unless the
            configuration says otherwise.
        gpu: whether ranks compute on GPUs.
    """
    plain = config.precision.backend == "torch" or config.precision.emulate_fp8
    backend = backend or ("torch" if plain else "te")
    stages = layers_per_stage(config.model.num_layers, config.parallel)
    return [_stage(config, index, layers, world_size, backend, gpu) for index, layers in enumerate(stages)]


def parameters_per_rank(config: RunConfig, *, stage: int) -> tuple[int, int]:
    """Scalars on a rank of a pipeline stage: those of the dense part, and those of routed experts."""
    model, parallel = config.model, config.parallel
    stages = layers_per_stage(model.num_layers, parallel)
    tp = parallel.tensor_model_parallel_size
    rows = padded_rows(config) // tp
    first, last = stage == 0, stage == len(stages) - 1
    embeddings = rows * model.hidden_size * (first + last)
    if first and last and model.share_embeddings_and_output_weights:
        embeddings = rows * model.hidden_size
    dense = stages[stage] * _dense_layer(model, tp) + embeddings + (model.hidden_size if last else 0)
    experts = 0
    if model.num_moe_experts is not None:
        shards = parallel.expert_model_parallel_size * parallel.expert_tensor_size
        width = 3 * model.hidden_size * (model.moe_ffn_hidden_size or 0)
        experts = stages[stage] * model.num_moe_experts * width // shards
    return dense, experts


def checkpoint_bytes(config: RunConfig, *, parameters: int) -> float:
    """Bytes of a checkpoint: trained weights, and fp32 main weights and two moments of each.

    Args:
        config: the run.
        parameters: of the whole model.
    """
    weights = 2 if config.precision.dtype == "bf16" else 4
    return (trained_parameters(config) or parameters) * (weights + 12.0)


def _dense_layer(model: ModelConfig, tp: int) -> int:
    """Scalars of a layer without its routed experts, on one of ``tp`` ranks."""
    h = model.hidden_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    projected = q + 2 * kv
    attention = (h * projected + (projected if model.add_qkv_bias else 0) + q * h) // tp
    norms = 2 * h + (2 * model.head_dim if model.qk_layernorm else 0)
    if not model.is_moe:
        return attention + norms + 3 * h * model.ffn_hidden_size // tp
    router = (model.num_moe_experts or 0) * h
    shared = 3 * h * (model.moe_shared_expert_intermediate_size or 0) // tp
    return attention + norms + router + shared + (h if model.moe_shared_expert_gate else 0)


def _stage(config: RunConfig, index: int, layers: int, world_size: int, backend: str, gpu: bool) -> StageMemory:
    parallel, precision = config.parallel, config.precision
    dense, experts = parameters_per_rank(config, stage=index)
    # ZeRO-1 shards optimizer state over all ranks that hold the same weight: for dense parameters the data- and
    # context-parallel ranks, for experts the ranks of a stage outside their EP x ETP grid.
    dense_share = max(1, world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))
    expert_grid = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    expert_share = max(1, world_size // (expert_grid * parallel.pipeline_model_parallel_size))
    bf16 = precision.dtype == "bf16"
    moment = {"fp32": 4, "bf16": 2, "fp8": 1}
    moments = moment[precision.exp_avg_dtype] + moment[precision.exp_avg_sq_dtype]
    # Bytes of main weights: none for fp32 weights, which are their own; 4 for bf16; 2 with the precision-aware
    # optimizer, which keeps only the 16 bits that a bf16 weight lacks.
    state = moments + ((2 if precision.use_precision_aware_optimizer else 4) if bf16 else 0)
    per_gradient = 4 if precision.grad_reduce_in_fp32 or not bf16 else 2
    stages = parallel.pipeline_model_parallel_size
    tp = parallel.tensor_model_parallel_size
    rows = padded_rows(config) // tp
    trained = trained_per_rank(config, (dense, experts), stage=index)
    held = dense + experts + sum(adapters_per_rank(config, stage=index))
    # Transformer Engine keeps each FP8 weight in row and in column order, one byte each.
    in_fp8 = 2.0 * _fp8_parameters(config, index, layers)
    both = 0.0 if config.performance.fp8_param_gather else in_fp8
    on_device = 1 - (config.performance.optimizer_offload_fraction or 0.0)
    return StageMemory(
        stage=index,
        parameters=held,
        weights=held * (2.0 if bf16 else 4.0) + both,
        gradients=sum(trained) * float(per_gradient),
        optimizer=state * on_device * (trained[0] / dense_share + trained[1] / expert_share),
        activations=_activations(config, index, layers, world_size, backend, gpu),
        loss=_loss(config, rows) if index == stages - 1 else 0.0,
    )


def _loss(config: RunConfig, rows: int) -> float:
    """Logits of a chunk, and the gradient of the output matrix: in bf16, and summed in fp32 over several chunks."""
    tokens = config.training.micro_batch_size * config.data.seq_length / config.parallel.context_parallel_size
    chunk = min(tokens, config.performance.cross_entropy_chunk_tokens or _LOSS_CHUNK_TOKENS)
    gradient = (_LOSS_BYTES if tokens <= chunk else _LOSS_BYTES + 4) if trains_output(config) else 0
    return rows * (float(chunk) * _LOSS_BYTES + config.model.hidden_size * gradient)


def _fp8_parameters(config: RunConfig, stage: int, layers: int) -> float:
    """Scalars of a rank that are also held in FP8, or, with fp8_param_gather, only in FP8."""
    precision, parallel = config.precision, config.parallel
    if precision.fp8 is None or precision.emulate_fp8:
        return 0.0
    dense, experts = parameters_per_rank(config, stage=stage)
    last = stage == parallel.pipeline_model_parallel_size - 1
    tp = parallel.tensor_model_parallel_size
    matrices = (stage == 0) + last
    if matrices == 2 and config.model.share_embeddings_and_output_weights:
        matrices = 1
    outside = padded_rows(config) // tp * config.model.hidden_size * matrices
    excluded = 0
    if precision.first_last_layers_bf16 and precision.fp8 != "delayed":
        excluded = precision.num_layers_at_start_in_bf16 * (stage == 0) + precision.num_layers_at_end_in_bf16 * last
    return max(0.0, (dense + experts - outside) * (1 - min(excluded, layers) / layers))


def _activations(config: RunConfig, stage: int, layers: int, world_size: int, backend: str, gpu: bool) -> float:
    """Bytes that the backward pass of all micro-batches in flight needs."""
    parallel, training = config.parallel, config.training
    tokens = training.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    kept, whole = _layer_activations(config, backend, gpu)
    in_flight = _in_flight(config, stage, world_size)
    working = tokens * _working(config, backend, gpu)
    frozen = config.lora.rank is not None
    if (
        backend == "torch" and config.model.is_moe and not _one_by_one(config) and not frozen
    ):  # gradients of all of a layer's experts
        experts = parameters_per_rank(config, stage=stage)[1] / layers
        working += experts * (2.0 if config.precision.dtype == "bf16" else 4.0)
    if training.recompute_granularity != "full":
        return tokens * layers * kept * in_flight + working
    again = layers
    if training.recompute_method == "block":
        again = min(layers, training.recompute_num_layers * parallel.virtual_stages)
    return tokens * ((again * kept + (layers - again) * whole) * in_flight + whole) + working


def _working(config: RunConfig, backend: str, gpu: bool) -> float:
    """Bytes per token that a layer's backward pass allocates in addition to what the forward pass kept."""
    model, parallel = config.model, config.parallel
    tp, cp, h = parallel.tensor_model_parallel_size, parallel.context_parallel_size, model.hidden_size
    width = model.moe_router_topk * (model.moe_ffn_hidden_size or 0) if model.is_moe else model.ffn_hidden_size
    again = _kept_by_attention(config, gpu) if backend == "torch" and _attends_again(config) else 0.0
    held = max(3 * width / tp, again) + 2 * h
    if parallel.virtual_stages > 1:  # an input and a gradient of each chunk are in transit
        held += 2 * parallel.virtual_stages * h / (tp if parallel.sequence_parallel else 1)
    if backend == "torch" and cp > 1:  # masks of the two chunks of queries, which all layers share
        held += (2 * cp + 1) * config.data.seq_length / (4 * cp * config.training.micro_batch_size)
    if backend == "torch" and parallel.expert_model_parallel_size * parallel.expert_tensor_size > 1 and model.is_moe:
        # Gradients of routed tokens, before and after the all-to-all.
        held += 2 * model.moe_router_topk * h * parallel.expert_tensor_size / (tp if parallel.sequence_parallel else 1)
    return held * (2.0 if config.precision.dtype == "bf16" else 4.0)


def _in_flight(config: RunConfig, stage: int, world_size: int) -> float:
    """Most micro-batches whose activations a rank holds; with virtual stages in fractions of its layers."""
    parallel, training = config.parallel, config.training
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_stages
    step = training.micro_batch_size * max(1, world_size // parallel.model_parallel_size)
    micro_batches = max(1, training.global_batch_size // step)
    if virtual == 1:
        return float(min(stages - stage, micro_batches))
    # Interleaved (Narayanan et al. 2021, section 2.2): the warm-up runs this many chunks ahead, then one more.
    ahead = 2 * (stages - stage - 1) + (virtual - 1) * stages
    return min(ahead + 1, micro_batches * virtual) / virtual


def _layer_activations(config: RunConfig, backend: str, gpu: bool) -> tuple[float, float]:
    """Bytes per token and layer on a rank: kept until the backward pass, and kept without recompute."""
    model, parallel, training = config.model, config.parallel, config.training
    size = 2.0 if config.precision.dtype == "bf16" else 4.0
    tp = parallel.tensor_model_parallel_size
    residual_tp = tp if parallel.sequence_parallel else 1
    h, q = model.hidden_size, model.num_attention_heads * model.head_dim
    kv = model.num_query_groups * model.head_dim
    # Inputs of both norms and what they put out; then Q, K, V and the attention's output.
    residual, attention = 4 * h / residual_tp, (2 * q + 2 * kv) / tp
    if backend == "torch":
        # Keys and values of the whole sequence, and what attention keeps for itself.
        attention = (2 * q + 2 * kv * parallel.context_parallel_size) / tp + _kept_by_attention(config, gpu)
        if _attends_again(config):
            attention = (2 * q + 2 * kv) / tp
    feed_forward = _feed_forward_activations(config, backend, residual_tp)
    # In FP8 the inputs of the four GEMMs are kept in one byte: both norms' output, attention's, and SwiGLU's.
    saved = 0.0
    if config.precision.fp8 is not None and not config.precision.emulate_fp8:
        saved = 2 * h / residual_tp + q / tp + feed_forward / 3
    whole = size * (residual + attention + feed_forward + _of_adapters(config, residual_tp)) - saved
    if training.recompute_granularity == "full":
        return size * h / residual_tp, whole
    if training.recompute_granularity == "selective" and {"mlp", "moe"} & set(training.recompute_modules):
        return size * (residual + attention), whole
    return whole, whole


def _of_adapters(config: RunConfig, residual_tp: int) -> float:
    """Scalars per token that frozen weights do not need and adapters keep, on a rank.

    A frozen layer needs its input for no weight gradient; its adapter does. An adapter keeps what it has projected.
    """
    if config.lora.rank is None:
        return 0.0
    model, tp, parts = config.model, config.parallel.tensor_model_parallel_size, adapted_parts(config)
    kept = 0.0
    for target, _, _ in products(config):
        copies = model.moe_router_topk if target.per_expert else 1
        whole = target.name.endswith(("o_proj", "down_proj"))  # summed over the ranks, and cut again under SP
        kept += copies * config.lora.rank / (residual_tp if whole else 1)
    if not parts["qkv"]:
        kept -= model.hidden_size / residual_tp
    width = (model.moe_shared_expert_intermediate_size or 0) if model.is_moe else model.ffn_hidden_size
    adapted = {name: any(not target.per_expert for target in found) for name, found in parts.items()}
    kept -= 0 if adapted["fc1"] or model.is_moe else model.hidden_size / residual_tp  # routers keep it, too
    kept -= 0 if adapted["fc2"] else width / tp
    if model.is_moe and not adapts_experts(config):
        kept -= model.moe_router_topk * model.hidden_size * config.parallel.expert_tensor_size / residual_tp
    return kept


def _kept_by_attention(config: RunConfig, gpu: bool) -> float:
    """Scalars per token: on a GPU torch's kernel keeps its output, in another layout than the projection's input."""
    if not gpu:
        return cpu_attention.kept(config)
    return config.model.num_attention_heads * config.model.head_dim / config.parallel.tensor_model_parallel_size


def _attends_again(config: RunConfig) -> bool:
    training = config.training
    return training.recompute_granularity == "selective" and "core_attn" in training.recompute_modules


def _one_by_one(config: RunConfig) -> bool:
    """Whether the torch backend's experts compute one after the other."""
    return config.precision.emulate_fp8 or config.performance.moe_grouped_gemm is False or adapts_experts(config)


def _feed_forward_activations(config: RunConfig, backend: str, residual_tp: int) -> float:
    """Scalars a token that the feed-forward of a layer keeps on a rank."""
    model, parallel = config.model, config.parallel
    h, tp = model.hidden_size, parallel.tensor_model_parallel_size
    if not model.is_moe:
        return 3 * model.ffn_hidden_size / tp
    width = model.moe_ffn_hidden_size or 0
    shared = 3 * (model.moe_shared_expert_intermediate_size or 0) / tp
    if backend == "te":
        # A routed token is copied to its experts, and comes back.
        return model.moe_router_topk * (2 * h / residual_tp + 3 * width / tp) + shared
    # A routed token is copied to every ETP rank of its expert. Computed one by one, experts keep SwiGLU's output before
    # and after it is multiplied by the routing weight; the grouped GEMM recomputes both.
    copies = parallel.expert_tensor_size / residual_tp
    gated = h / residual_tp if model.moe_shared_expert_gate else 0.0
    return model.moe_router_topk * (h * copies + (4 if _one_by_one(config) else 2) * width / tp) + shared + gated
