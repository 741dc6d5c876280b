"""The content of a checkpoint: how it is gathered from a run's components, and loaded into them."""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file, save_file

from megatron_qwen import device
from megatron_qwen.checkpoint import generators, optimizer_state
from megatron_qwen.checkpoint.metadata import plain_objects_only, read_metadata
from megatron_qwen.checkpoint.paths import GENERATORS, RUN_YAML, STATE, TOKENIZER
from megatron_qwen.config.sections import ParallelConfig
from megatron_qwen.data.tokenizers.tokenizer import copy_tokenizer
from megatron_qwen.distributed.environment import environment_of_attempt
from megatron_qwen.models.sharding import sharded_state_dict, trained_only, without_adapters
from megatron_qwen.models.te_backend import fp8_weights
from megatron_qwen.provenance import code_version

_EXTRA_STATE = "_extra_state"


def sharded_state(
    modules: Sequence[GPTModel], optimizer: ChainedOptimizer | None, groups: ProcessGroupCollection, *, loading: bool
) -> dict[str, Any]:
    """What is trained: weights and, where an optimizer is given, its main weights and moments.

    Frozen weights are not in a checkpoint: with LoRA they are those of another one, the base (``adapted.py``).
    """
    state = trained_only(sharded_state_dict(modules, groups))
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded(optimizer, state, groups, loading=loading)
    if not loading:
        fp8_weights.put_main_weights(state, optimizer)
    return state


def load_sharded(
    path: Path,
    modules: Sequence[GPTModel],
    optimizer: ChainedOptimizer | None,
    groups: ProcessGroupCollection,
    *,
    optimizer_step: int,
    change: Callable[[], None] | None = None,
) -> None:
    """Fills weights and optimizer from a verified checkpoint, whatever layout wrote it.

    Args:
        path: the checkpoint.
        modules: chunks of this rank.
        optimizer: None loads weights only. So does a checkpoint without optimizer state (a converted model): then
            the main weights are the loaded ones and the moments stay empty.
        groups: groups of this rank.
        optimizer_step: steps the optimizer has taken (``state.json``).
        change: changes the weights before the optimizer takes them for its main weights. The optimizer's state is then
            not loaded.
    """
    saved = read_metadata(path).state_dict_metadata
    with_state = optimizer if has_optimizer(saved) and change is None else None
    wanted = sharded_state(modules, with_state, groups, loading=True)
    _drop_absent_extra_state(wanted, saved)
    weights = _load(wanted, path, modules)
    if change is not None:
        change()
    if with_state is not None:
        optimizer_state.load(with_state, wanted["optimizer"], step=optimizer_step)
    elif optimizer is not None:
        optimizer.reload_model_params()
        fp8_weights.load_main_weights(optimizer, modules, weights)


def load_base(path: Path, modules: Sequence[GPTModel], groups: ProcessGroupCollection) -> None:
    """Fills all weights but adapters from the verified checkpoint that the adapters are for; arguments as above."""
    wanted = without_adapters(sharded_state_dict(modules, groups))
    _drop_absent_extra_state(wanted, read_metadata(path).state_dict_metadata)
    _load(wanted, path, modules)


def _load(wanted: dict[str, Any], path: Path, modules: Sequence[GPTModel]) -> list[dict[str, Any]]:
    """Puts into ``wanted`` what a checkpoint holds of it, and weights into the modules; returns those of each."""
    asked = {model: set(entries) for model, entries in wanted.items()}
    with plain_objects_only():
        wanted.update(dist_checkpointing.load(wanted, str(path)))
    found = []
    for index, module in enumerate(modules):
        model = "model" if len(modules) == 1 else f"model{index}"
        answer = module.load_state_dict(wanted[model], strict=False)
        wrong = [*answer.unexpected_keys, *(key for key in answer.missing_keys if key in asked[model])]
        assert not wrong, wrong
        found.append(wanted[model])
    return found


def has_optimizer(saved: Iterable[str]) -> bool:
    """Whether a checkpoint with these tensor names holds optimizer state."""
    return any(name.startswith("optimizer.") for name in saved)


def _drop_absent_extra_state(wanted: dict[str, Any], saved: Container[str]) -> None:
    """Removes Transformer Engine's extra state from a load request if a checkpoint of the torch backend lacks it."""
    for key, state in wanted.items():
        if key.startswith("model"):
            for name in [name for name, entry in state.items() if isinstance(entry, ShardedObject)]:
                if name.endswith(_EXTRA_STATE) and state[name].unique_key not in saved:
                    del state[name]


def write_small_files(
    directory: Path,
    *,
    progress: dict[str, int],
    data: dict[str, Any],
    optimizer_step: int,
    parallel: ParallelConfig,
    run_yaml: str,
    tokenizer: Path | None,
    more: Mapping[str, Any],
) -> None:
    """Rank 0 writes configuration, counters, tokenizer and generator states of all ranks; every rank must call.

    Args:
        directory: the temporary directory of the checkpoint.
        progress: counters.
        data: the ledger of what has been read.
        optimizer_step: steps the optimizer has taken.
        parallel: the layout; generator states are restored under the same layout only.
        run_yaml: the resolved configuration.
        tokenizer: directory of the run's tokenizer, so that a checkpoint can be exported wherever it is moved.
        more: to be noted in state.json.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(generators.capture(), everyone if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        states = {f"rank{rank}.{name}": state for rank, states in enumerate(everyone) for name, state in states.items()}
        save_file(states, directory / GENERATORS)
        content = {
            "progress": progress,
            "data": data,
            "optimizer_step": optimizer_step,
            "world_size": dist.get_world_size(),
            "layout": asdict(parallel),
            "threads": torch.get_num_threads(),
            "backend": device.backend(),
            "torch": torch.__version__,
            "code": code_version(),
            "environment": environment_of_attempt(),
            **more,
        }
        (directory / RUN_YAML).write_text(run_yaml)
        (directory / STATE).write_text(json.dumps(content, indent=2))
        if tokenizer is not None and tokenizer.is_dir():
            copy_tokenizer(tokenizer, directory / TOKENIZER)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    content: dict[str, Any] = json.loads((path / STATE).read_text())
    return content


def restore_generators(path: Path, *, parallel: ParallelConfig, state: dict[str, Any]) -> bool:
    """Restores this rank's generators if layout and kind of device are those of the save; returns whether it did."""
    sizes = {name: value for name, value in asdict(parallel).items() if name.endswith("_size")}
    saved = {name: state["layout"].get(name) for name in sizes}
    same_place = state["world_size"] == dist.get_world_size() and state["backend"] == device.backend()
    if not same_place or saved != sizes:
        return False
    prefix = f"rank{dist.get_rank()}."
    states = load_file(path / GENERATORS)
    generators.restore(
        {name.removeprefix(prefix): tensor for name, tensor in states.items() if name.startswith(prefix)}
    )
    return True
