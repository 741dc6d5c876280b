"""The process groups of a layout. The only file that calls megatron's parallel_state.

megatron-core keeps its groups in module globals; all other code here receives the collection that this file returns.
"""

from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.config.sections import ParallelConfig


def create(parallel: ParallelConfig, *, seed: int, graphs: bool = False) -> ProcessGroupCollection:
    """Makes every group of the layout and seeds the generators of dropout.

    Args:
        parallel: the layout; it must be legal for the world that torch.distributed has joined.
        seed: base seed; ranks that hold different parts of a tensor draw different dropout.
        graphs: whether CUDA graphs will be recorded, whose generators must be told of it.

    Returns:
        The groups this rank is in (tp, pp, cp, dp, dp_cp, ep, expt_tp, expt_dp, embd and their unions).
    """
    virtual = parallel.virtual_stages
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=True,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, te_rng_tracker=graphs, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def of_one_rank(*, seed: int) -> ProcessGroupCollection:
    """The groups of a world of one rank, made at the first call; every later model of the process shares them."""
    if parallel_state.is_initialized():
        return ProcessGroupCollection.use_mpu_process_groups()
    return create(ParallelConfig(), seed=seed)


def destroy() -> None:
    """Forgets every group, so that another layout can be made in the same process."""
    parallel_state.destroy_model_parallel()


def is_first_stage(groups: ProcessGroupCollection) -> bool:
    """Whether this rank holds the input embedding."""
    return int(groups.pp.rank()) == 0


def is_last_stage(groups: ProcessGroupCollection) -> bool:
    """Whether this rank computes the loss."""
    return int(groups.pp.rank()) == int(groups.pp.size()) - 1
