"""Gives a model chunk its adapters and freezes its own weights.

An adapter is a module of its own next to the layer, which is left as it is (any backend's, FP8 too): a hook adds its
product to the layer's output. megatron-core computes several Hugging Face layers as one (``linear_qkv``: q, k and v;
``linear_fc1``: gate and up). Each of them has an adapter of its own here, as in PEFT.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_qwen.config.lora import EMBEDDING, HEAD, LoraConfig, targets
from megatron_qwen.config.run import RunConfig
from megatron_qwen.hf.adapters import ADAPTERS, CORE_MODULES
from megatron_qwen.models.lora.linear import Adapters
from megatron_qwen.models.lora.vocabulary import EmbeddingAdapter, HeadAdapter

_OF_EXPERTS = "mlp.experts.experts"


def attach(module: GPTModel, config: RunConfig, groups: ProcessGroupCollection) -> None:
    """Gives a model chunk its adapters, and freezes all other weights but those of ``lora.modules_to_save``.

    Args:
        module: the chunk, before it is wrapped.
        config: of the run; nothing happens where ``lora.rank`` is null.
        groups: of this rank.
    """
    lora = config.lora
    if lora.rank is None:
        return
    module.requires_grad_(False)
    _train_whole(module, lora)
    wanted: dict[str, list[str]] = {}
    chosen = targets(lora, config.model)
    for target in (one for one in chosen if one.per_layer):
        wanted.setdefault(CORE_MODULES[target.name], []).append(target.name.rsplit(".", 1)[1])
    for layer in module.decoder.layers:
        for place, parts in wanted.items():
            for parent, name in _linears(layer, place):
                _adapt(parent, name, parts, config, groups, expert=_OF_EXPERTS in place)
    _adapt_vocabulary(module, {one.name for one in chosen}, config, groups)
    if module.pre_process and EMBEDDING not in lora.modules_to_save:
        # A layer that is recomputed gets gradients for its weights only if its input asks for one.
        module.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())


def _train_whole(module: GPTModel, lora: LoraConfig) -> None:
    if module.pre_process and EMBEDDING in lora.modules_to_save:
        module.embedding.word_embeddings.weight.requires_grad_(True)
    if module.post_process and module.output_layer.weight is not None:
        tied = module.share_embeddings_and_output_weights
        module.output_layer.weight.requires_grad_((EMBEDDING if tied else HEAD) in lora.modules_to_save)


def _linears(layer: nn.Module, place: str) -> list[tuple[nn.Module, str]]:
    """The modules that hold a kind of linear layer, and its name in them: one, or one of each expert of this rank."""
    path, name = place.rsplit(".", 1)
    if path == _OF_EXPERTS:
        experts: Sequence[nn.Module] = layer.get_submodule("mlp.experts").local_experts  # type: ignore[assignment]
        return [(expert, name) for expert in experts]
    return [(layer.get_submodule(path), name)]


def _adapt(
    parent: nn.Module,
    name: str,
    parts: Sequence[str],
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    expert: bool,
) -> None:
    linear: Any = getattr(parent, name)
    column = name in ("linear_qkv", "linear_fc1")
    adapters = Adapters(linear.weight, parts, config, groups, column=column, expert=expert)
    parent.add_module(f"{name}{ADAPTERS}", adapters)

    def add(_module: nn.Module, inputs: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        return output[0] + adapters(inputs[0]), output[1]

    linear.register_forward_hook(add)


def _adapt_vocabulary(module: GPTModel, chosen: set[str], config: RunConfig, groups: ProcessGroupCollection) -> None:
    if module.pre_process and EMBEDDING in chosen:
        words = module.embedding.word_embeddings
        adapter = EmbeddingAdapter(words.weight, config, groups)
        module.embedding.add_module(f"word_embeddings{ADAPTERS}", adapter)
        words.register_forward_hook(lambda _module, inputs, output: output + adapter(inputs[0]))
    if module.post_process and HEAD in chosen:
        module.add_module(f"output_layer{ADAPTERS}", HeadAdapter(module.output_layer.weight, config, groups))


def head_adapter(module: GPTModel) -> HeadAdapter | None:
    """The adapter of a chunk's output layer, if it has one."""
    found = getattr(module, f"output_layer{ADAPTERS}", None)
    assert found is None or isinstance(found, HeadAdapter)
    return found
