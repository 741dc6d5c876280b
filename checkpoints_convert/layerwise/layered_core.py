"""A checkpoint run by megatron-core's modules, one layer at a time, as training computes it."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from checkpoints_convert.layerwise.layered import Ends
from checkpoints_convert.tensor_set import ExportedWeights
from megatron_qwen.checkpoint.weights import ModelWeights
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, PrecisionConfig, RopeConfig
from megatron_qwen.distributed import groups as process_groups
from megatron_qwen.distributed.rank import RankInfo, join
from megatron_qwen.hf.mapping import CoreTensor, tensor_mappings
from megatron_qwen.models.backend import choose
from megatron_qwen.models.build import bare_module
from megatron_qwen.models.sharding import Slice, slices

_VOCABULARY = 128  # of the one-layer model, whose embedding is not used


class CoreLayers:
    """The model of a checkpoint in the torch backend's modules.

    Args:
        weights: of the checkpoint.
        rope: of its model.
        dtype: format to compute in, bfloat16 or float32.
        place: device to compute on.
    """

    def __init__(self, weights: ModelWeights, rope: RopeConfig, *, dtype: torch.dtype, place: torch.device) -> None:
        self._weights, self._place = weights, place
        self._ends = Ends(ExportedWeights(weights), dtype=dtype, place=place)
        self.num_layers, self.vocab_size = weights.model.num_layers, self._ends.vocab_size
        self.embed, self.output_rows = self._ends.embed, self._ends.output_rows
        model = replace(weights.model, num_layers=1, vocab_size=_VOCABULARY, hidden_dropout=0.0, attention_dropout=0.0)
        precision = PrecisionConfig(backend="torch", dtype="fp32" if dtype == torch.float32 else "bf16")
        data = DataConfig(seq_length=min(4096, model.max_position_embeddings))
        config = RunConfig(recipe="custom", model=model, rope=rope, precision=precision, data=data)
        if not dist.is_initialized():
            join(RankInfo(0, 1, 0, 1, "127.0.0.1", 0), timeout_minutes=5)
        groups = process_groups.of_one_rank(seed=config.training.seed)
        module: Any = bare_module(config, groups, choose(precision)).to(place)
        module.eval()
        self._module = module
        self._mappings = {mapping.core: mapping for mapping in tensor_mappings(weights.model)}
        self._slices = [part for part in slices([module], groups) if part.name in self._mappings]
        self._fill_outside_layers()

    @torch.no_grad()
    def load_layer(self, index: int) -> None:
        """Brings a layer into memory, in place of the one before."""
        for part in self._slices:
            if self._mappings[part.name].per_layer:
                self._fill(part, (index, *part.leading[1:]))

    @torch.no_grad()
    def _fill_outside_layers(self) -> None:
        for part in self._slices:
            if part.name == "decoder.final_layernorm.weight":
                self._fill(part, ())

    def _fill(self, part: Slice, leading: tuple[int, ...]) -> None:
        mapping = self._mappings[part.name]
        start = part.offset[0]
        rows = part.data.view(-1, *part.global_shape[1:]).shape[0] if len(part.global_shape) > 1 else part.data.numel()
        values = self._weights.rows(CoreTensor(mapping, leading, ()), start, start + rows)
        part.data.copy_(values.view_as(part.data))

    @torch.no_grad()
    def layer(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, h] -> [s, h] by the loaded layer."""
        angles = self._module.rotary_pos_emb(hidden.shape[0])
        found, _ = self._module.decoder.layers[0](hidden[:, None], attention_mask=None, rotary_pos_emb=angles)
        after: torch.Tensor = found[:, 0]
        return after

    @torch.no_grad()
    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, h] -> [s, h]."""
        found: torch.Tensor = self._module.decoder.final_layernorm(hidden[:, None])
        return found[:, 0]
