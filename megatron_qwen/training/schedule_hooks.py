"""What megatron-core's pipeline schedules call around the backward pass: finishing and synchronising gradients."""

from functools import partial

from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.models.build import Model


def install_schedule_hooks(model: Model, optimizer: ChainedOptimizer, groups: ProcessGroupCollection) -> None:
    """Tells megatron-core's schedules how this model's gradients are finished and synchronised."""
    core = model.core
    core.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups)
    core.grad_scale_func = optimizer.scale_loss
    overlapped = model.chunks[0].ddp_config.overlap_grad_reduce
    # megatron-core 0.19 (pipeline_parallel/schedules.py): the interleaved schedule wants a list, one function a chunk;
    # the others call what they are given.
    single = len(model.chunks) == 1
    if overlapped:
        # Reduction starts with the last micro-batch: before it, gradients are only added up on the rank.
        syncs = [chunk.no_sync for chunk in model.chunks]
        core.no_sync_func = syncs[0] if single else syncs
        starts = [chunk.start_grad_sync for chunk in model.chunks]
        core.grad_sync_func = starts[0] if single else starts
    if model.chunks[0].ddp_config.overlap_param_gather:
        gathers = [chunk.start_param_sync for chunk in model.chunks]
        core.param_sync_func = gathers[0] if single else gathers
