"""The weights and optimizer state of a rank as tensors to hash, and what they were when an update had written them."""

from dataclasses import dataclass

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.integrity.fingerprint import combined, fingerprints

Named = dict[str, torch.Tensor]


def weights(components: TrainingComponents, *, expert: bool) -> Named:
    """The buffers that hold all weights of the rank: the experts' under expert parallelism, or all others.

    Frozen weights are in no buffer; each is one tensor.
    """
    frozen = {
        f"frozen {name} of chunk {index}": parameter.data
        for index, module in enumerate(components.model.modules)
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad and getattr(parameter, "allreduce", True) is not expert
    }
    return frozen | {
        f"weights of chunk {index}, buffer {number}{', experts' if expert else ''}": buffer.param_data
        for index, chunk in enumerate(components.model.chunks)
        for number, buffer in enumerate(chunk.expert_parallel_buffers if expert else chunk.buffers)
        if buffer.param_data is not None and buffer.param_data.numel()
    }


def own_shards(components: TrainingComponents) -> Named:
    """The parts of the weights' buffers that this rank's own update writes; the others come from its peers."""
    groups = components.groups
    found: Named = {}
    for index, chunk in enumerate(components.model.chunks):
        for buffers, group in ((chunk.buffers, groups.dp_cp), (chunk.expert_parallel_buffers, groups.expt_dp)):
            buckets = [bucket for buffer in buffers for bucket in buffer.buckets if bucket.param_data is not None]
            for bucket in buckets:
                shard = bucket.param_data.view(-1).chunk(group.size())[group.rank()]
                found[f"shard {len(found)} of the weights of chunk {index}"] = shard
    return found


def optimizer_state(components: TrainingComponents) -> Named:
    """Main weights and moments of the rank's shard.

    In fp32 the main weights are views of the weights' buffers, which ``weights`` has. State on the host
    (performance.optimizer_offload_fraction) is not covered: its copies are in flight between the steps.
    """
    covered = {
        buffer.param_data.untyped_storage().data_ptr()
        for chunk in components.model.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        if buffer.param_data is not None
    }
    found: Named = {}
    for index, part in enumerate(components.optimizer.chained_optimizers):
        if part.is_stub_optimizer or isinstance(part.optimizer, HybridDeviceOptimizer):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in covered and parameter.numel():
                    found[f"main weight {len(found)} of optimizer {index}"] = parameter
        for state in part.optimizer.state.values():
            for kind, value in state.items():
                if torch.is_tensor(value) and value.dim() and value.numel():
                    found[f"{kind} {len(found)} of optimizer {index}"] = value
    return found


@dataclass(frozen=True)
class HeldNow:
    """The state of a rank as it is now.

    Args:
        changed: names of the tensors that are no longer what was noted.
        dense: hash of the weights that all data-parallel replicas have.
        expert: hash of the experts' weights under expert parallelism.
    """

    changed: list[str]
    dense: int
    expert: int


class HeldHashes:
    """Hashes of what the last update wrote, to be compared with what the next one will read.

    Memory that changes between two steps is found on its own rank, so the rank is known even without replicas.

    Args:
        components: of the run.
        parts: the optimizer state is divided into; 0 leaves it out.
    """

    def __init__(self, components: TrainingComponents, *, parts: int) -> None:
        self._components, self._parts = components, parts
        # With overlap the weights are complete only after the next forward pass, and replicas are compared then. What
        # an update has written before is the rank's own shard.
        self._overlapped = any(chunk.ddp_config.overlap_param_gather for chunk in components.model.chunks)
        self._noted: dict[str, int] = {}
        self._turn = 0

    def note(self, turn: int) -> None:
        """Hashes the weights and part ``turn`` (modulo the number of parts) of the optimizer state."""
        self._turn = turn
        tensors = self._state() | (own_shards(self._components) if self._overlapped else self._weights())
        self._noted = dict(zip(tensors, fingerprints(list(tensors.values())), strict=True))

    def forget(self) -> None:
        """Drops the hashes: an update is about to change what they are of."""
        self._noted = {}

    def look(self) -> HeldNow:
        """Compares the state with what was noted, if anything was."""
        tensors = self._weights()
        if self._noted:
            tensors |= self._state() | (own_shards(self._components) if self._overlapped else {})
        now = dict(zip(tensors, fingerprints(list(tensors.values())), strict=True))
        expert = weights(self._components, expert=True)
        dense = weights(self._components, expert=False)
        return HeldNow(
            changed=[name for name, value in self._noted.items() if now[name] != value],
            dense=combined([now[name] for name in dense]),
            expert=combined([now[name] for name in expert]),
        )

    def _weights(self) -> Named:
        return weights(self._components, expert=False) | weights(self._components, expert=True)

    def _state(self) -> Named:
        if not self._parts:
            return {}
        return dict(list(optimizer_state(self._components).items())[self._turn % self._parts :: self._parts])
