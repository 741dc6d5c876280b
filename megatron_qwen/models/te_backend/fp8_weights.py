"""Initialising and saving weights that Transformer Engine holds in FP8 (performance.fp8_param_gather).

A slice of an FP8 weight cannot be written to, because the whole weight shares one scale. So bf16 tensors are
initialised and then quantized. A checkpoint or an export holds the main weight rounded to bf16, as without FP8, and not
the dequantized FP8 weight, which has fewer bits.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer


@contextmanager
def plain_weights(modules: Sequence[GPTModel]) -> Iterator[None]:
    """Replaces FP8 weights by empty tensors of their nominal dtype for the body, which fills them.

    Afterwards the FP8 weights are quantized from them. Main weights that the optimizer creates later start from the
    values before quantization.
    """
    held = [
        (owner, name, weight)
        for module in modules
        for owner in module.modules()
        for name, weight in owner._parameters.items()
        if weight is not None and is_float8tensor(weight)
    ]
    for owner, name, weight in held:
        empty = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        owner._parameters[name] = torch.nn.Parameter(empty)
    try:
        yield
    finally:
        for owner, name, weight in held:
            filled = owner._parameters[name]
            assert filled is not None
            with torch.no_grad():
                weight.copy_(filled)
            # megatron-core's optimizer initialises main weights from this attribute.
            weight._high_precision_init_val = filled.detach().cpu()
            owner._parameters[name] = weight


def put_main_weights(state: Mapping[str, Any], optimizer: ChainedOptimizer | None) -> None:
    """Replaces FP8 weights in a state dict by their main weights, rounded to the nominal dtype and on the host.

    Args:
        state: sharded state dict of this rank's chunks.
        optimizer: has the main weights; every data-parallel rank must call.
    """
    entries = [
        entry
        for key, chunk in state.items()
        if key.startswith("model")
        for entry in chunk.values()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and is_float8tensor(entry.data)
    ]
    if not entries:
        return
    exact = {id(weight): values for weight, values in _main_weights(optimizer)} if optimizer is not None else {}
    for entry in entries:
        weight: Any = entry.data
        entry.data = exact[id(weight)] if id(weight) in exact else weight.dequantize().cpu()


def load_main_weights(
    optimizer: ChainedOptimizer, modules: Sequence[GPTModel], loaded: Sequence[dict[str, Any]]
) -> None:
    """Sets the main weights of FP8 weights from loaded weights, for a checkpoint without optimizer state.

    Args:
        optimizer: has the main weights.
        modules: chunks of this rank.
        loaded: their loaded state dicts.
    """
    values = {
        id(weight): state[name]
        for module, state in zip(modules, loaded, strict=True)
        for name, weight in module.named_parameters()
        if is_float8tensor(weight)
    }
    for part, weight, place in _fp8_weights(optimizer):
        if place is not None:
            main = part._get_main_param_and_optimizer_states(weight)["param"]
            main.data.copy_(values[id(weight)].view(-1)[place.start : place.end])


def _main_weights(optimizer: ChainedOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """FP8 weights of this rank, each with its whole main weight, gathered over the data-parallel group, on the host."""
    for part, weight, place in _fp8_weights(optimizer):
        whole = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        if place is not None:
            main = part._get_main_param_and_optimizer_states(weight)["param"]
            whole[place.start : place.end] = main.detach().view(-1)
        if part.data_parallel_group.size() > 1:  # each rank has its shard, and zeros elsewhere
            dist.all_reduce(whole, group=part.data_parallel_group)
        yield weight, whole.view(weight.shape).cpu()


def _fp8_weights(optimizer: ChainedOptimizer) -> Iterator[tuple[Any, torch.Tensor, Any]]:
    """Every FP8 weight, its optimizer and this rank's range of the flat main weight; the same order on all ranks."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
            here = ChainMap(*(bucket["param_map"] for buckets in ranges.values() for bucket in buckets))
            for weight in buffer.param_index_map:
                if is_float8tensor(weight):
                    yield part, weight, here[weight]["param"] if weight in here else None
