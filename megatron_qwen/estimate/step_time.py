"""Time of an optimizer step: GEMMs, attention, memory-bound operations and communication of the busiest rank.

A pipeline stage needs the time of its layers for each micro-batch. The slowest stage sets the pace, and every rank
waits for (p - 1) / v micro-batches, the bubble of the interleaved schedule (Narayanan et al. 2021, arXiv 2104.04473,
section 2.2). Of communication that megatron-core overlaps with compute, only the exposed part is counted.
"""

from dataclasses import dataclass

from megatron_qwen.config.pipeline import layers_per_stage
from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.adapters import trained_per_rank, trains_output
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.hardware import Hardware
from megatron_qwen.estimate.layer_time import MicroBatchTime, layer_time, linear_time
from megatron_qwen.estimate.memory import parameters_per_rank

# Bytes per parameter of an optimizer step, in fp32: the norm reads the gradient (4), clipping reads and writes it (8),
# Adam reads it (4) and reads and writes main weight and two moments (24). Left out: the bf16 weight (2).
_OPTIMIZER_BYTES = 40.0
# Bytes per logit in the loss: bf16, four passes (written by the GEMM, read by the softmax, then read and overwritten by
# the gradient). The GEMMs of the backward pass read it again; that is in their rate.
_LOGIT_BYTES = 8.0
# Bytes per element of the output matrix for its gradient (objectives/cross_entropy.py). One chunk: scaled in bf16 (4)
# and added to the fp32 main gradient (10). n chunks: 28 + 10 n, as an fp32 sum is zeroed, added to, scaled and rounded.
# 20 is in between, set by hand: 2.5 ms of the 349 ms that the 7B takes for 4096 tokens on an H200.
_OUTPUT_GRADIENT_BYTES = 20.0
# Fraction of a micro-batch's time behind which data-parallel communication can hide: half of it for the gradient
# reduce-scatter, half for the parameter all-gather. Chosen, not measured.
_OVERLAP = 0.7
# Exposed fraction of pipeline communication in the interleaved schedule. Chosen, not measured.
_EXPOSED_PP_COMM = 0.25


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on the busiest rank, by part. Communication is what overlap leaves exposed.

    Args:
        gemm: matrix multiplications, with those of the loss.
        attention: scores and values.
        memory_bound: norms, activations, residuals, rounding to FP8, the loss; and waiting for kernel launches.
        tp_comm: communication of tensor parallelism.
        cp_comm: communication of context parallelism.
        pp_comm: communication of pipeline parallelism.
        ep_comm: communication of expert parallelism.
        bubble: waiting for the pipeline.
        dp_comm: communication of data parallelism.
        optimizer: the update.
        tokens: tokens per step; not a time.
    """

    gemm: float
    attention: float
    memory_bound: float
    tp_comm: float
    cp_comm: float
    pp_comm: float
    ep_comm: float
    bubble: float
    dp_comm: float
    optimizer: float
    tokens: int

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        compute = self.gemm + self.attention + self.memory_bound + self.optimizer
        communication = self.tp_comm + self.cp_comm + self.pp_comm + self.ep_comm + self.dp_comm
        return compute + communication + self.bubble


def step_time(
    config: RunConfig, *, device: Hardware, world_size: int, assumptions: Assumptions | None = None
) -> StepTime:
    """Predicts the seconds of a step, by part.

    Args:
        config: a legal configuration.
        device: the kind of GPU and its links.
        world_size: number of ranks.
        assumptions: what the configuration does not contain.
    """
    assume = assumptions or Assumptions()
    parallel, training = config.parallel, config.training
    stages = layers_per_stage(config.model.num_layers, parallel)
    data_ranks = max(1, world_size // parallel.model_parallel_size)
    micro_batches = max(1, training.global_batch_size // (training.micro_batch_size * data_ranks))
    # All stages between the first and the last are equal; one of them is enough.
    distinct = {index: stages[index] for index in {0, len(stages) // 2, len(stages) - 1}}
    per_stage = [_stage(config, device, index, layers, assume) for index, layers in distinct.items()]
    slowest = max(per_stage, key=lambda stage: stage.total).times(1 / assume.achieved)
    whole = slowest.times(micro_batches)
    dp_comm, updated = _data_parallel(config, device, world_size, micro_batch_s=slowest.total)
    return StepTime(
        gemm=whole.gemm,
        attention=whole.attention,
        memory_bound=whole.memory_bound,
        tp_comm=whole.tp_comm,
        cp_comm=whole.cp_comm,
        pp_comm=whole.pp_comm,
        ep_comm=whole.ep_comm,
        bubble=(len(stages) - 1) / parallel.virtual_stages * slowest.total,
        dp_comm=dp_comm,
        optimizer=updated * _OPTIMIZER_BYTES / (device.memory_gb_s * 1e9),
        tokens=training.global_batch_size * config.data.seq_length,
    )


def _data_parallel(
    config: RunConfig, device: Hardware, world_size: int, *, micro_batch_s: float
) -> tuple[float, float]:
    """Exposed seconds of data-parallel communication, and parameters that a rank updates (ZeRO-1)."""
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    stage_ranks = max(1, world_size // parallel.pipeline_model_parallel_size)
    dense, experts = trained_per_rank(config, parameters_per_rank(config, stage=0), stage=0)
    # Dense parameters are replicated over all ranks of a stage but the TP ones (context ranks hold them too), experts
    # over the ranks of a stage outside their EP x ETP grid.
    grid = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    shards = max(1, stage_ranks // tp), max(1, stage_ranks // grid)
    # A ring reduce-scatter or all-gather over n ranks sends (n - 1) / n of the buffer from every rank.
    sent = dense * (shards[0] - 1) / shards[0], experts * (shards[1] - 1) / shards[1]
    links = [_data_link(device, count, stride) for count, stride in zip(shards, (tp, grid), strict=True)]
    scalars = sum(part / link for part, link in zip(sent, links, strict=True))
    reduce = (4.0 if config.precision.grad_reduce_in_fp32 else 2.0) * scalars  # fp32 or bf16 gradients
    gather = 2.0 * scalars  # bf16 weights
    behind = _OVERLAP * micro_batch_s / 2
    exposed = max(0.0, reduce - (behind if parallel.overlap_grad_reduce else 0.0))
    exposed += max(0.0, gather - (behind if parallel.overlap_param_gather else 0.0))
    return exposed, dense / shards[0] + experts / shards[1]


def _data_link(device: Hardware, ranks: int, stride: int) -> float:
    """Bytes per second of a group whose ranks are ``stride`` apart.

    Such a group has devices_per_node / stride members in a node, which together use that many network links.
    """
    if ranks * stride <= device.devices_per_node:
        return 1e9 * device.nvlink_gb_s
    return 1e9 * min(device.nvlink_gb_s, device.network_gb_s * max(1, device.devices_per_node // stride))


def _stage(config: RunConfig, device: Hardware, index: int, layers: int, assume: Assumptions) -> MicroBatchTime:
    """A micro-batch on one pipeline stage: its layers, its sends, and on the last one the loss."""
    parallel, precision = config.parallel, config.precision
    last = index == parallel.pipeline_model_parallel_size - 1
    layer = layer_time(config, device, assume, fp8=precision.fp8 is not None)
    outer = 0  # layers that FP8 leaves in bf16
    if precision.fp8 is not None and precision.fp8 != "delayed" and precision.first_last_layers_bf16:
        outer = (precision.num_layers_at_start_in_bf16 if index == 0 else 0) + (
            precision.num_layers_at_end_in_bf16 if last else 0
        )
    outer = min(outer, layers)
    whole = layer.times(layers - outer) + _pipeline_sends(config, device)
    if outer:
        whole += layer_time(config, device, assume, fp8=False).times(outer)
    return whole + _loss(config, device, assume) if last else whole


def _pipeline_sends(config: RunConfig, device: Hardware) -> MicroBatchTime:
    """Activations to the next pipeline rank and gradients to the previous one, for every virtual stage."""
    parallel, training = config.parallel, config.training
    if parallel.pipeline_model_parallel_size == 1:
        return MicroBatchTime()
    tokens = training.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    # 2 directions x virtual stages x 2 bytes (bf16) x [tokens, hidden / TP].
    sent = 2 * parallel.virtual_stages * 2.0 * tokens * config.model.hidden_size / split
    overlapped = parallel.virtual_stages > 1 and parallel.overlap_p2p_comm
    return MicroBatchTime(pp_comm=sent / (device.network_gb_s * 1e9) * (_EXPOSED_PP_COMM if overlapped else 1.0))


def _loss(config: RunConfig, device: Hardware, assume: Assumptions) -> MicroBatchTime:
    """The output layer and cross-entropy of a micro-batch; always in bf16."""
    model, parallel, training = config.model, config.parallel, config.training
    tokens = training.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    rows = model.vocab_size / parallel.tensor_model_parallel_size
    trained = trains_output(config)
    gemm = linear_time(device.bf16, device, tokens, model.hidden_size, rows, 0.0, trained=trained) / assume.power
    moved = _LOGIT_BYTES * tokens * rows + (_OUTPUT_GRADIENT_BYTES * rows * model.hidden_size if trained else 0.0)
    return MicroBatchTime(gemm=gemm, memory_bound=moved / (device.memory_gb_s * 1e9))
