"""Adapters of a linear layer of megatron-core, which may be several linear layers of Hugging Face.

Under tensor parallelism ``lora_B`` of a column-parallel layer is split as the layer's outputs and ``lora_A`` of a
row-parallel one as its inputs; the other matrix is whole on every rank. What is communicated has the rank of the
adapter as its width, not that of the layer.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_qwen.config.run import RunConfig
from megatron_qwen.models.lora.adapter import Adapter
from megatron_qwen.models.torch_backend.arrival import arrive

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


class Adapters(nn.Module):
    """The adapters of one linear layer of megatron-core, a child for each Hugging Face layer that has one.

    Args:
        weight: of the layer, this rank's part.
        parts: last names of the Hugging Face layers with an adapter.
        config: of the run.
        groups: of this rank.
        column: whether the layer is split over its outputs; over its inputs otherwise.
        expert: whether it is part of a routed expert, which no tensor-parallel ranks share.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        parts: Sequence[str],
        config: RunConfig,
        groups: ProcessGroupCollection,
        *,
        column: bool,
        expert: bool,
    ) -> None:
        super().__init__()
        lora, model, parallel = config.lora, config.model, config.parallel
        assert lora.rank is not None
        self.scale, self._rate, self._column = lora.scale, lora.dropout, column
        self._group = groups.expt_tp if expert else groups.tp
        self._split = self._group.size() > 1
        self._sequence_parallel = parallel.sequence_parallel and self._split
        rows, inputs = weight.shape
        self._kv_heads = model.num_query_groups // self._group.size()
        self._sizes = _outputs_of_parts(parts, rows, heads=model.num_attention_heads // model.num_query_groups)
        axes = {"lora_B": 0} if column else {"lora_A": 1}
        for part in parts:
            adapter = Adapter(lora.rank, inputs, self._sizes[part], like=weight, axes=axes, group=self._group)
            # Under sequence parallelism the whole matrix meets this rank's tokens alone: megatron-core sums gradients.
            whole = adapter.lora_A if column else adapter.lora_B
            setattr(whole, "sequence_parallel", self._sequence_parallel)  # noqa: B010
            for parameter in adapter.parameters():  # which ranks share it: those that share the layer's weight
                setattr(parameter, "allreduce", getattr(weight, "allreduce", True))  # noqa: B010
            self.add_module(part, adapter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapters add to the layer's output.

        Args:
            x: the layer's input, [..., inputs]; this rank's tokens or features of it, as the layer gets them.

        Returns:
            Of the shape of the layer's output.
        """
        matrices = self.matrices()
        # Scaled where it is narrow.
        projected = self._low_rank(x, [first for first, _ in matrices.values()])
        low = [self.scale * self._gathered(part) for part in projected]
        products = {name: F.linear(part, last) for (name, (_, last)), part in zip(matrices.items(), low, strict=True)}
        return self.joined(products)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Those of all children; megatron-core takes a module without this method for one that no ranks share."""
        found: dict[str, Any] = {}
        for name, adapter in self.named_children():
            assert isinstance(adapter, Adapter)
            found |= adapter.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        return found

    def matrices(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """``lora_A`` and ``lora_B`` of each part, after their data-parallel all-gather."""
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, adapter in self.named_children():
            assert isinstance(adapter, Adapter)
            arrive(adapter)
            found[name] = adapter.lora_A, adapter.lora_B
        return found

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """The input with dropout, another mask at every call."""
        if not self._rate or not self.training:
            return x
        # Ranks that hold other tokens or features need other masks; ranks that hold the same need the same.
        other = self._sequence_parallel or (self._split and not self._column)
        with tensor_parallel.get_cuda_rng_tracker().fork() if other else contextlib.nullcontext():
            return F.dropout(x, self._rate)

    def joined(self, products: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Outputs of the parts in the order of the layer's rows; zeros for a part without an adapter.

        Args:
            products: by part, [..., outputs of the part].
        """
        some = next(iter(products.values()))
        if len(self._sizes) == 1:
            return some
        outs = [
            products[name] if name in products else some.new_zeros(*some.shape[:-1], size)
            for name, size in self._sizes.items()
        ]
        if "q_proj" not in self._sizes:
            return torch.cat(outs, dim=-1)
        # Rows of linear_qkv are grouped by KV head: its query heads, its key, its value (``hf/mapping.py``).
        return torch.cat([out.unflatten(-1, (self._kv_heads, -1)) for out in outs], dim=-1).flatten(-2)

    def _low_rank(self, x: torch.Tensor, first: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """[..., rank] of each part; one product for all where they have one input."""
        if self._rate and self.training:
            return [F.linear(self.dropped(x), matrix) for matrix in first]
        parts: Sequence[torch.Tensor] = F.linear(x, torch.cat(tuple(first))).split(len(first[0]), dim=-1)
        return parts

    def _gathered(self, low: torch.Tensor) -> torch.Tensor:
        """Every token of a column-parallel layer, or the sum over the ranks of a row-parallel one."""
        if not self._split:
            return low
        if self._column and self._sequence_parallel:
            collect = tensor_parallel.gather_from_sequence_parallel_region
        elif self._column:
            collect = tensor_parallel.copy_to_tensor_model_parallel_region
        elif self._sequence_parallel:
            collect = tensor_parallel.reduce_scatter_to_sequence_parallel_region
        else:
            collect = tensor_parallel.reduce_from_tensor_model_parallel_region
        found: torch.Tensor = collect(low, group=self._group)
        return found


def _outputs_of_parts(parts: Sequence[str], rows: int, *, heads: int) -> dict[str, int]:
    """Outputs of every Hugging Face layer that a linear layer computes, with or without an adapter, in its order.

    Args:
        parts: some of them.
        rows: outputs of the layer on this rank.
        heads: query heads of each KV head.
    """
    if parts[0] in _QKV:
        return dict(zip(_QKV, (rows * heads // (heads + 2), rows // (heads + 2), rows // (heads + 2)), strict=True))
    return dict.fromkeys(_GATE_UP, rows // 2) if parts[0] in _GATE_UP else {parts[0]: rows}
