"""Adapters of the vocabulary's matrices: the embedding, and the output layer.

Both are ``lora_B lora_A`` with ``lora_B`` [vocabulary, rank], split over the tensor-parallel ranks as the matrix
itself, and ``lora_A`` [rank, hidden]. (PEFT exchanges rows and columns of an embedding's.)
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_qwen.config.lora import EMBEDDING, HEAD
from megatron_qwen.config.run import RunConfig
from megatron_qwen.models.lora.adapter import Adapter
from megatron_qwen.models.torch_backend.arrival import arrive


class _OfVocabulary(nn.Module):
    """One adapter under the name of its Hugging Face module.

    Args:
        name: of the module.
        weight: of the matrix, this rank's rows.
        config: of the run.
        groups: of this rank.
    """

    def __init__(self, name: str, weight: torch.Tensor, config: RunConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        lora = config.lora
        assert lora.rank is not None
        self.scale, self.group, self.dropout = lora.scale, groups.tp, lora.dropout
        self.sequence_parallel = config.parallel.sequence_parallel and groups.tp.size() > 1
        rows, width = weight.shape
        adapter = Adapter(lora.rank, width, rows, like=weight, axes={"lora_B": 0}, group=groups.tp, padded=True)
        setattr(adapter.lora_A, "sequence_parallel", self.sequence_parallel)  # noqa: B010
        self._name = name
        self.add_module(name, adapter)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``lora_A`` [rank, h] and this rank's rows of ``lora_B`` [v / TP, rank], after their all-gather."""
        adapter = self.get_submodule(self._name)
        assert isinstance(adapter, Adapter)
        arrive(adapter)
        return adapter.lora_A, adapter.lora_B

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """That of the adapter."""
        adapter = self.get_submodule(self._name)
        assert isinstance(adapter, Adapter)
        return adapter.sharded_state_dict(f"{prefix}{self._name}.", sharded_offsets, metadata)


class EmbeddingAdapter(_OfVocabulary):
    """The adapter of the embedding, without dropout, as in PEFT; arguments as above but ``name``."""

    def __init__(self, weight: torch.Tensor, config: RunConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(EMBEDDING, weight, config, groups)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """What it adds to the output of megatron-core's embedding.

        Args:
            tokens: ids, [b, s].

        Returns:
            [b, s, h]; [s / TP, b, h] under sequence parallelism, where megatron-core's embedding gives that, too.
        """
        first, last = self.matrices()
        local = tokens - last.shape[0] * self.group.rank()
        mine = (local >= 0) & (local < last.shape[0])
        low = F.embedding(local.where(mine, 0), last) * mine.unsqueeze(-1)
        if self.sequence_parallel:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                low.transpose(0, 1).contiguous(), group=self.group
            )
        elif self.group.size() > 1:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=self.group)
        return F.linear(self.scale * low, first.t())


class HeadAdapter(_OfVocabulary):
    """The adapter of the output layer, which is not called as a module: the loss takes hidden states and weight.

    So both get columns: hidden states their product with ``lora_A``, the weight ``lora_B``.
    """

    def __init__(self, weight: torch.Tensor, config: RunConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(HEAD, weight, config, groups)

    def widened(self, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and output weight whose product has the adapter in it.

        Args:
            hidden: output of the last layer, [..., h].
            weight: this rank's rows of the output matrix, [v / TP, h].

        Returns:
            [..., h + rank] and [v / TP, h + rank].
        """
        first, last = self.matrices()
        inputs = hidden
        if self.dropout and self.training:
            with tensor_parallel.get_cuda_rng_tracker().fork() if self.sequence_parallel else contextlib.nullcontext():
                inputs = F.dropout(hidden, self.dropout)
        low = self.scale * F.linear(inputs, first)
        return torch.cat((hidden, low), dim=-1), torch.cat((weight, last), dim=1)
