"""Builds this rank's part of a model for inference, and fills it from whatever holds the weights."""

from dataclasses import replace
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import PerformanceConfig, PrecisionConfig
from megatron_qwen.device import has_cuda
from megatron_qwen.estimate.choices import choose
from megatron_qwen.estimate.machine import Machine
from megatron_qwen.hf.mapping import CoreTensor, tensor_mappings
from megatron_qwen.inference.stage import Stage
from megatron_qwen.models.backend import choose as choose_backend
from megatron_qwen.models.build import bare_chunk
from megatron_qwen.models.sharding import Slice, slices


class WeightRows(Protocol):
    """Weights under megatron-core's names: of a checkpoint of any layout, or of a Hugging Face directory."""

    def rows(self, item: CoreTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor at one layer and expert."""


def inference_config(config: RunConfig, *, dtype: Literal["bf16", "fp32"] | None = None) -> RunConfig:
    """The configuration of a run as inference computes it: without dropout, FP8 and what was chosen for its training.

    Args:
        config: the run, with the layout of inference.
        dtype: fp32 or bf16; None is the run's.
    """
    model = replace(config.model, hidden_dropout=0.0, attention_dropout=0.0)
    precision = PrecisionConfig(backend="torch", dtype=dtype or config.precision.dtype)
    parallel = replace(config.parallel, virtual_pipeline_model_parallel_size=None, context_parallel_size=1)
    return replace(config, model=model, precision=precision, parallel=parallel, performance=PerformanceConfig())


def load_stage(
    config: RunConfig,
    groups: ProcessGroupCollection,
    weights: WeightRows,
    *,
    longest: int | None = None,
    copy_bytes: int = 0,
) -> Stage:
    """This rank's part of a model.

    Args:
        config: from ``inference_config``.
        groups: of its layout.
        weights: all of them; a rank reads its part.
        longest: positions that a sequence can have; None is what the model has.
        copy_bytes: that copies of weights may take (``Stage``).
    """
    backend = choose_backend(config.precision)
    machine = Machine(backend.name, gpu=has_cuda())
    config = choose(config, machine, world_size=dist.get_world_size())[0]
    module = bare_chunk(config, groups, backend).to(device.current())
    module.eval()
    fill(slices([module], groups), config, weights)
    longest = longest or config.model.max_position_embeddings
    return Stage(module, config, groups, longest=longest, copy_bytes=copy_bytes)


@torch.no_grad()
def fill(parts: object, config: RunConfig, weights: WeightRows) -> None:
    """Copies weights into the parameters of a rank; rows that only pad the vocabulary become zeros."""
    mappings = {mapping.core: mapping for mapping in tensor_mappings(config.model)}
    for part in parts:  # type: ignore[attr-defined]
        if part.name in mappings:
            _fill(part, CoreTensor(mappings[part.name], part.leading, ()), weights)


def _fill(part: Slice, item: CoreTensor, weights: WeightRows) -> None:
    inner = part.data.shape[part.data.dim() - len(part.global_shape) :]
    data = part.data.view(inner)
    start = part.offset[0]
    stop = min(start + inner[0], item.mapping.num_rows)
    if stop > start:
        values = weights.rows(item, start, stop)
        for axis in range(1, len(inner)):
            values = values.narrow(axis, part.offset[axis], inner[axis])
        data[: stop - start].copy_(values)
    data[max(0, stop - start) :].zero_()
