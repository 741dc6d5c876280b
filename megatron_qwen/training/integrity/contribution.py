"""What one rank alone has put into the gradients of a step: the gradient buffers before they are reduced."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.models.build import Model
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.integrity.fingerprint import combined, fingerprints


@dataclass(frozen=True)
class Contribution:
    """A rank's gradients as two figures.

    Args:
        hash: of their bytes.
        square: sum of squares in float64, for ranks whose kernels do not give the same bits twice.
    """

    hash: int
    square: float


class ContributionProbe:
    """Takes a rank's gradients when its backward pass has ended and nothing has been reduced."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.taken: Contribution | None = None

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Context of a step that is probed. Its reductions start after the last micro-batch, also with overlap.

        megatron-core calls ``finalize_model_grads_func`` there; with overlap it would have started to reduce before.
        """
        core, chunks = self._model.core, self._model.chunks
        finalize = core.finalize_model_grads_func
        no_sync, grad_sync = core.no_sync_func, core.grad_sync_func

        def probe_and_finalize(*arguments: Any, **words: Any) -> None:
            self.taken = _contribution(self._model)
            if chunks[0].ddp_config.overlap_grad_reduce:
                for chunk in chunks:
                    chunk.start_grad_sync()
            finalize(*arguments, **words)

        def no_sync_to_the_end() -> AbstractContextManager[None]:
            for chunk in chunks:
                for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                    group.is_last_microbatch = False  # until zero_grad_buffer
            return nullcontext()

        core.finalize_model_grads_func, core.grad_sync_func = probe_and_finalize, None
        core.no_sync_func = no_sync_to_the_end if no_sync is not None else None
        try:
            yield
        finally:
            core.finalize_model_grads_func, core.no_sync_func, core.grad_sync_func = finalize, no_sync, grad_sync


def _contribution(model: Model) -> Contribution:
    # Experts add up tokens of several data-parallel ranks, so their gradients belong to no rank's slice of the batch.
    gradients = [buffer.grad_data for chunk in model.chunks for buffer in chunk.buffers]
    # Without a float64 copy, for which a GPU may have no room.
    square = sum(float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2 for gradient in gradients)
    return Contribution(combined(fingerprints(gradients)), square)


def residue(components: TrainingComponents) -> tuple[int, int]:
    """Hashes of what a reduce-scatter has left: a rank's own part of the others' shards, and its reduced shard.

    The reduction of the distributed optimizer writes a rank's shard only, so the rest of its buffers still has what the
    rank itself computed. It tells after the step which rank computed something else, without a cost in steps that
    nobody asks about.
    """
    groups = components.groups
    others: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    size, rank = groups.dp_cp.size(), groups.dp_cp.rank()
    for chunk in components.model.chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                for index, shard in enumerate(bucket.grad_data.chunk(size)):
                    (own if index == rank else others).append(shard)
    return combined(fingerprints(others)), combined(fingerprints(own))


def odd_ranks(before: tuple[int, int], after: tuple[int, int], *, device: torch.device) -> tuple[int, ...]:
    """Ranks that computed something else in one of two runs of a step, from their ``residue`` in each.

    A rank that computed something else differs in what it left of the others' shards. Its peers differ only in their
    reduced shard, into which it was added. If no rank differs outside its shard, the difference arose in that shard.
    """
    differs = torch.tensor([int(a != b) for a, b in zip(before, after, strict=True)], device=device)
    received = [torch.empty_like(differs) for _ in range(dist.get_world_size())]
    dist.all_gather(received, differs)
    others, own = torch.stack(received).T.tolist()
    return tuple(rank for rank, differing in enumerate(others if any(others) else own) if differing)
