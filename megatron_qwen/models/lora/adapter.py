"""The two matrices of an adapter, as one rank holds them."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import distributed as dist
from torch import nn


class Adapter(nn.Module):
    """This rank's part of one adapter.

    Args:
        rank: of the adapter.
        inputs: features of this rank's input.
        outputs: features of this rank's output.
        like: weight of the layer, whose format the adapter has.
        axes: the axis along which each matrix is split over ``group``; a matrix that is not named is whole.
        group: the tensor-parallel ranks of the layer.
        padded: the rows of lora_B are those of the vocabulary, whose padding depends on the layout.
    """

    def __init__(
        self,
        rank: int,
        inputs: int,
        outputs: int,
        *,
        like: torch.Tensor,
        axes: Mapping[str, int],
        group: dist.ProcessGroup,
        padded: bool = False,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, dtype=like.dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.empty(outputs, rank, dtype=like.dtype, device=like.device))
        self._axes, self._group, self._padded = dict(axes), group, padded
        for name, axis in axes.items():
            set_tensor_model_parallel_attributes(getattr(self, name), is_parallel=True, dim=axis, stride=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Both matrices as slices of the whole ones."""
        assert metadata is not None
        own = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        groups = {"tp_group": self._group, "dp_cp_group": metadata["dp_cp_group"]}
        if not self._padded:
            found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
                own, prefix, self._axes, sharded_offsets, **groups
            )
            return found
        found = make_sharded_tensors_for_checkpoint({"lora_A": self.lora_A}, prefix, {}, sharded_offsets, **groups)
        key = f"{prefix}lora_B"
        found[key] = make_tp_sharded_tensor_for_checkpoint(
            self.lora_B, key, allow_shape_mismatch=True, prepend_offsets=sharded_offsets, **groups
        )
        return found
