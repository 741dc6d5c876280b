"""What one rank holds: its shard of the weights, main weights and moments, and whatever else its modules save.

Nothing is gathered to write it, unlike a checkpoint that loads under every layout. So it loads under the same layout
only, on the rank that wrote it.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from megatron.core.optimizer import ChainedOptimizer

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig, as_dict
from megatron_qwen.models.build import Model


def own_tensors(model: Model, optimizer: ChainedOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of this rank with their names; mostly views, so they must be copied before the next step.

    Of a weight that data-parallel ranks share, each has the part that its optimizer updates. With
    parallel.overlap_param_gather only that part is up to date after a step.
    """
    yield from _weight_shards(model)
    yield from _saved_by_modules(model)
    for place, part, parameter in _optimized(optimizer):
        weights = _storage(parameter)
        for key, value in part._get_main_param_and_optimizer_states(parameter).items():
            if key != "param" or _storage(value) != weights:  # in fp32 the main weight is the weight itself
                yield f"{place}.{key}", value


def layout_hash(config: RunConfig, *, backend: str, world_size: int, frozen: str = "") -> str:
    """Hash of everything that decides which tensors a rank holds, 16 hexadecimal digits.

    Args:
        config: with all automatic choices filled in.
        backend: of the model.
        world_size: ranks.
        frozen: names the weights that are not trained, and so are not in it.
    """
    sections = as_dict(config)
    parts = [*(sections[name] for name in ("model", "parallel", "precision")), backend, device.backend(), world_size]
    if frozen:
        parts += [sections["lora"], frozen]
    return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode())


def load_tensors(
    tensors: dict[str, torch.Tensor], model: Model, optimizer: ChainedOptimizer, *, optimizer_step: int
) -> None:
    """Puts back what ``own_tensors`` gave; called by all ranks together, each with its own tensors.

    Args:
        tensors: by name; checked with ``mismatch`` before.
        model: chunks of this rank.
        optimizer: of the run.
        optimizer_step: steps it has taken.
    """
    with torch.no_grad():
        for key, shard in _weight_shards(model):
            shard.copy_(tensors[key])
        for place, part, parameter in _optimized(optimizer):
            names = part._get_main_param_and_optimizer_states(parameter)
            values = {key: tensors.get(f"{place}.{key}", value) for key, value in names.items()}
            part._set_main_param_and_optimizer_states(parameter, values)
    for index, module in enumerate(model.modules):
        prefix = f"module{index}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            module.load_state_dict(own, strict=False)
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            for group in part.optimizer.param_groups:
                group["step"] = optimizer_step
    # Every rank has the weights that its optimizer updates; the others come as they come after a step.
    with torch.no_grad(), model.whole_parameters():  # gathers where parallel.overlap_param_gather is set
        for chunk in model.chunks:
            if not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def mismatch(tensors: dict[str, torch.Tensor], model: Model, optimizer: ChainedOptimizer) -> str | None:
    """Why these tensors are not this rank's, None if they are."""
    wanted = {key: (value.shape, value.dtype) for key, value in own_tensors(model, optimizer)}
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        return f"{len(odd)} tensors are missing or not of this run, such as {odd[0]}"
    for key, (shape, dtype) in wanted.items():
        if (tensors[key].shape, tensors[key].dtype) != (shape, dtype):
            return f"{key} is {tensors[key].dtype} {tuple(tensors[key].shape)}, not {dtype} {tuple(shape)}"
    return None


def _weight_shards(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's shard of every bucket of weights, [elements / data-parallel ranks] each."""
    for index, chunk in enumerate(model.chunks):
        for number, buffer in enumerate((*chunk.buffers, *chunk.expert_parallel_buffers)):
            ranks, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
            for count, bucket in enumerate(buffer.buckets):
                yield f"weights{index}.{number}.{count}", bucket.param_data.view(-1).chunk(ranks)[rank]


def _saved_by_modules(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """What modules save besides parameters: buffers, and the extra state of Transformer Engine."""
    for index, module in enumerate(model.modules):
        for name, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                yield f"module{index}.{name}", value


def _optimized(optimizer: ChainedOptimizer) -> Iterator[tuple[str, Any, torch.nn.Parameter]]:
    """Every parameter of which this rank's optimizer has a part: its place, its optimizer, itself."""
    for number, part in enumerate(optimizer.chained_optimizers):
        if part.is_stub_optimizer:
            continue
        for index, ranges in enumerate(part.gbuf_ranges):
            for buckets in ranges.values():
                for count, bucket in enumerate(buckets):
                    for order, parameter in enumerate(bucket["param_map"]):
                        yield f"optimizer{number}.{index}.{count}.{order}", part, parameter


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
