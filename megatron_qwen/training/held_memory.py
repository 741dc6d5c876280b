"""Persistent memory of a rank in bytes: weights, gradients and optimizer state, counted tensor by tensor."""

from collections.abc import Iterable

import torch

from megatron_qwen.models.build import Model
from megatron_qwen.training.components import TrainingComponents


def held_bytes(components: TrainingComponents) -> dict[str, int]:
    """Weights, gradients and optimizer state of this rank, in bytes; memory that two of them share counts once."""
    seen: set[int] = set()
    return {name: _new_bytes(seen, tensors) for name, tensors in held_tensors(components).items()}


def held_tensors(components: TrainingComponents) -> dict[str, list[torch.Tensor]]:
    """The tensors themselves; some are views of one another's memory."""
    return {
        "weights": list(_weights(components.model)),
        "gradients": list(_gradients(components.model)),
        "optimizer": list(_optimizer(components)),
    }


def _new_bytes(seen: set[int], tensors: Iterable[torch.Tensor]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _weights(model: Model) -> Iterable[torch.Tensor]:
    for module in model.modules:
        yield from module.parameters()


def _gradients(model: Model) -> Iterable[torch.Tensor]:
    for chunk in model.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data


def _optimizer(components: TrainingComponents) -> Iterable[torch.Tensor]:
    for part in components.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value) and value.dim())
