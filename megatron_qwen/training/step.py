"""One optimizer step."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import batched

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.models.build import Model
from megatron_qwen.training.forward import SUMS, ForwardStep


@dataclass(frozen=True)
class BatchResult:
    """What a global batch gave, the same on every rank.

    Args:
        loss: mean of the objective's loss; in pretraining cross-entropy in nats per token.
        weight: what the mean is over: tokens that carried loss, or sequences.
        tokens: tokens of the batch, without padding.
        metrics: means of the objective's metrics.
        metric_weights: what each is a mean over.
    """

    loss: float
    weight: int
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    metric_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        loss: mean of the objective's loss over the global batch; in pretraining cross-entropy in nats per token.
        grad_norm: global gradient norm before clipping.
        weight: what the mean is over: tokens that carried loss, or sequences.
        tokens: tokens of the batch, without padding.
        skipped: whether the update was skipped because the loss or the gradient norm was not finite.
        metrics: further figures of the objective.
    """

    loss: float
    grad_norm: float
    weight: int
    tokens: int
    skipped: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


# Gradients of a rank's batches; what compute_gradients does once it knows the run.
Compute = Callable[[Sequence[Batch]], StepResult]


def train_step(
    config: RunConfig,
    model: Model,
    optimizer: ChainedOptimizer,
    groups: ProcessGroupCollection,
    forward_step: ForwardStep,
    batches: Sequence[Batch],
    *,
    before_update: Callable[[], None] = lambda: None,
    examine: Callable[[StepResult, Compute], StepResult] | None = None,
) -> StepResult:
    """Forward and backward over a global batch, then the update; called by all ranks together.

    Two scalars reach the host in every step, because they decide whether the update is skipped: the loss, which is
    all-reduced over all ranks, and the gradient norm, which is reduced over every rank that holds a part of the model.
    An inf or NaN on any rank makes them inf or NaN on all ranks, so all ranks skip together and no further collective
    is needed to agree.

    Args:
        config: the configuration in force for this step.
        model: chunks of this rank.
        optimizer: of the run.
        groups: groups of this rank.
        forward_step: called by the schedule for every micro-batch and model chunk.
        batches: the micro-batches of this rank.
        before_update: called when the gradients are reduced and known to be finite, before they are clipped.
        examine: called with the gradients reduced; may compute them again, of the same batches or of others, and
            decides whether the step is skipped.
    """
    compute = partial(compute_gradients, config, model, optimizer, groups, forward_step)
    result = compute(batches)
    if examine is not None:
        result = examine(result, compute)
    if result.skipped:
        return result
    before_update()
    if config.optim.clip_grad:
        for part in optimizer.chained_optimizers:
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32(
                    parameters,
                    config.optim.clip_grad,
                    result.grad_norm,
                    # Where this is true, megatron-core put the gradients into param.decoupled_grad: their dtype is not
                    # the parameter's, and torch refuses them in param.grad while param.grad_dtype has its default.
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
    optimizer.step_with_ready_grads()
    return result


def compute_gradients(
    config: RunConfig,
    model: Model,
    optimizer: ChainedOptimizer,
    groups: ProcessGroupCollection,
    forward_step: ForwardStep,
    batches: Sequence[Batch],
) -> StepResult:
    """Forward and backward over a global batch, up to reduced gradients; changes no weight, so it can be repeated.

    Returns:
        The step, with ``skipped`` where loss or gradient norm is not finite.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    done = run_batch(config, model, groups, forward_step, batches, forward_only=False)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    skipped = not (math.isfinite(grad_norm) and math.isfinite(done.loss))
    return StepResult(done.loss, grad_norm, done.weight, done.tokens, skipped, done.metrics)


def run_batch(
    config: RunConfig,
    model: Model,
    groups: ProcessGroupCollection,
    forward_step: ForwardStep,
    batches: Sequence[Batch],
    *,
    forward_only: bool,
) -> BatchResult:
    """Runs megatron-core's schedule over one global batch.

    Args:
        config: the configuration in force for this batch (sequence length, micro-batch size).
        model: chunks of this rank.
        groups: groups of this rank.
        forward_step: called by the schedule for every micro-batch and model chunk.
        batches: the micro-batches of this rank.
        forward_only: skip the backward pass.
    """
    micro = config.training.micro_batch_size
    packed = batches[0].cu_seqlens is not None

    def chunk_batches(chunk: int) -> Iterator[Batch | None]:
        module = model.modules[chunk]
        needed = module.pre_process or module.post_process or packed
        return iter(batches) if needed else itertools.repeat(None)

    iterators = [chunk_batches(chunk) for chunk in range(len(model.chunks))]
    with torch.set_grad_enabled(not forward_only):
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
            num_microbatches=len(batches),
            # Packed: the micro-batch is one row of micro * seq_length tokens, with cu_seqlens.
            seq_length=config.data.seq_length * (micro if packed else 1),
            micro_batch_size=1 if packed else micro,
            forward_only=forward_only,
        )
    return _means(reports, forward_step.metrics, groups, batches[0].tokens.device)


def _means(
    reports: list[dict[str, torch.Tensor]], metrics: Sequence[str], groups: ProcessGroupCollection, device: torch.device
) -> BatchResult:
    """Means of loss and metrics over the global batch.

    Each report is the number of tokens, then [total, weight] of the loss and of each metric, of one micro-batch; only
    the last pipeline stage has any. A mean is total / weight over the whole global batch, not the mean of the ranks'
    means: with masked tokens each rank has another weight, and a mean of means would depend on the layout.

    One all-reduce over the world does it, since the ranks that hold the same numbers are made to count once: ranks of
    other pipeline stages add zero because they have no reports, and of a tensor-parallel group only rank 0 counts.
    Data-parallel and context-parallel ranks hold different tokens and all count. float64, because a float32 sum loses
    single tokens above 2**24 of them.
    """
    sums = torch.zeros(3 + 2 * len(metrics), dtype=torch.float64, device=device)
    for report in reports:
        sums += report[SUMS]
    if groups.tp.rank() > 0:
        sums.zero_()  # tensor-parallel ranks all report the same
    dist.all_reduce(sums)
    tokens, *pairs = sums.tolist()
    (loss, weight), *others = batched(pairs, 2)
    means = {name: total / max(count, 1.0) for name, (total, count) in zip(metrics, others, strict=True)}
    weights = {name: count for name, (_, count) in zip(metrics, others, strict=True)}
    return BatchResult(loss / max(weight, 1.0), int(weight), int(tokens), means, weights)
