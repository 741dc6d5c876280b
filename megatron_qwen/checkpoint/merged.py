"""The weights of a model with its adapters merged: what every program computes with that does not train them."""

from collections.abc import Iterator
from itertools import accumulate

import torch

from megatron_qwen.checkpoint.read import Chunk
from megatron_qwen.checkpoint.weights import CheckpointWeights
from megatron_qwen.config.lora import LoraConfig, LoraTarget, targets
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.hf.adapters import adapter_mappings, adapter_tensor, hf_module
from megatron_qwen.hf.mapping import CoreTensor, TensorMapping, tensor_mappings


class MergedWeights:
    """Frozen weights plus scale x lora_B lora_A, summed in fp32, row by row as they are asked for.

    Args:
        base: the frozen weights.
        adapters: a checkpoint of adapters, opened with the table of ``hf/adapters.py``.
        lora: which adapters they are.
    """

    def __init__(self, base: CheckpointWeights, adapters: CheckpointWeights, lora: LoraConfig) -> None:
        self._base, self._scale, self._adapters = base, lora.scale, adapters
        table = {mapping.core: mapping for mapping in adapter_mappings(lora, base.model)}
        self._whole = {name for name in table if any(name == mapping.core for mapping in tensor_mappings(base.model))}
        self._parts = {
            mapping.core: _parts_with_adapters(mapping, targets(lora, base.model), table)
            for mapping in tensor_mappings(base.model)
        }

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""
        return self._base.model

    def dtype(self, core: str) -> torch.dtype:
        """The dtype of a weight: that of the base."""
        return self._base.dtype(core)

    def rows(self, item: CoreTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight at one layer and expert, without its leading dimensions."""
        core = item.mapping.core
        if core in self._whole:
            return self._adapters.rows(item, start, stop).to(self.dtype(core))
        found = self._base.rows(item, start, stop)
        if not self._parts[core]:
            return found
        sum_ = found.float()
        spans = item.mapping.origin()
        begins = accumulate((last - first for _, (first, last) in spans), initial=0)
        for (part, (first, last)), at in zip(spans, begins, strict=False):
            low, high = max(start, at), min(stop, at + last - first)
            if low < high and part in self._parts[core]:
                product = self._product(self._parts[core][part], item, first + low - at, first + high - at)
                sum_[low - start : high - start] += product
        return sum_.to(found.dtype)

    def chunks(self) -> Iterator[Chunk]:
        """Every stored slice of the checkpoint of adapters; the base is verified as it is read."""
        return self._adapters.chunks()

    def _product(
        self, matrices: tuple[TensorMapping, TensorMapping], item: CoreTensor, start: int, stop: int
    ) -> torch.Tensor:
        """Rows of scale x lora_B lora_A in fp32."""
        first, last = (CoreTensor(mapping, item.leading, ()) for mapping in matrices)
        low = self._adapters.rows(first, 0, first.mapping.num_rows).float()
        return self._scale * (self._adapters.rows(last, start, stop).float() @ low)


def _parts_with_adapters(
    mapping: TensorMapping, chosen: tuple[LoraTarget, ...], table: dict[str, TensorMapping]
) -> dict[int, tuple[TensorMapping, TensorMapping]]:
    """Of a weight's Hugging Face tensors those with an adapter, by their number: lora_A and lora_B."""
    found = {}
    for target in chosen:
        name = f"{hf_module(target)}.weight"
        if name in mapping.hf:
            pair = (table[adapter_tensor(target, "lora_A")], table[adapter_tensor(target, "lora_B")])
            found[mapping.hf.index(name)] = pair
    return found
