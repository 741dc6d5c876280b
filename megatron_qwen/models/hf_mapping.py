"""The one table between megatron-core's tensors and Hugging Face's, for both directions.

A rule names a tensor of the checkpoint (layers and experts are its leading dimensions) and the Hugging Face
tensors it holds, with the function that takes it apart and the one that puts it together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_qwen.config.sections import ModelConfig

Split = Callable[[torch.Tensor, ModelConfig], tuple[torch.Tensor, ...]]
Join = Callable[[tuple[torch.Tensor, ...], ModelConfig], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """One tensor of the checkpoint and what it is in Hugging Face.

    Args:
        core: name in the checkpoint; ``decoder.layers.`` and ``experts.experts.`` stand for leading dimensions.
        hf: Hugging Face names, with ``{layer}`` and ``{expert}``.
        split: checkpoint tensor -> Hugging Face tensors.
        join: Hugging Face tensors -> checkpoint tensor.
    """

    core: str
    hf: tuple[str, ...]
    split: Split
    join: Join

    @property
    def per_layer(self) -> bool:
        """Whether the first dimension counts layers."""
        return ".layers." in self.core

    @property
    def per_expert(self) -> bool:
        """Whether the second dimension counts experts."""
        return ".experts." in self.core


@dataclass(frozen=True)
class Mapped:
    """One application of a rule.

    Args:
        rule: the rule.
        leading: index of the layer, and of the expert, in the checkpoint tensor.
        names: the Hugging Face names it yields.
    """

    rule: Rule
    leading: tuple[int, ...]
    names: tuple[str, ...]


def _split_one(tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    return (tensor,)


def _join_one(tensors: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    return tensors[0]


def split_vocabulary(tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """[padded vocabulary, h] -> [vocabulary, h]."""
    return (tensor[: model.vocab_size],)


def split_gated(tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """[2 f, h] -> gate [f, h], up [f, h]."""
    return tensor.chunk(2)


def join_stacked(tensors: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    """Stacks along the first dimension."""
    return torch.cat(tensors)


def split_qkv(tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """[groups x (q heads of a group + 2) x d, ...] -> Q [heads x d, ...], K and V [groups x d, ...].

    megatron-core keeps each KV head beside the query heads it serves, so that TP cuts between groups.
    """
    groups, d = model.num_query_groups, model.head_dim
    per_group = model.num_attention_heads // groups
    rest = tensor.shape[1:]
    grouped = tensor.view(groups, per_group + 2, d, *rest)
    q, k, v = grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1]
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def join_qkv(tensors: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    """The inverse of ``split_qkv``."""
    groups, d = model.num_query_groups, model.head_dim
    rest = tensors[0].shape[1:]
    return torch.cat([tensor.view(groups, -1, d, *rest) for tensor in tensors], dim=1).reshape(-1, *rest)


def _one(core: str, hf: str, split: Split = _split_one) -> Rule:
    return Rule(core, (hf,), split, _join_one)


_LAYER, _HF = "decoder.layers.", "model.layers.{layer}."


def rules(model: ModelConfig) -> list[Rule]:
    """The rules of a model, in the order of its tensors."""
    found = [_one("embedding.word_embeddings.weight", "model.embed_tokens.weight", split_vocabulary)]
    found += _attention(model) + (_moe(model) if model.is_moe else _dense())
    found.append(_one("decoder.final_layernorm.weight", "model.norm.weight"))
    if not model.share_embeddings_and_output_weights:
        found.append(_one("output_layer.weight", "lm_head.weight", split_vocabulary))
    return found


def _attention(model: ModelConfig) -> list[Rule]:
    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"{_HF}self_attn.{part}_proj.{kind}" for part in "qkv")

    core = f"{_LAYER}self_attention."
    found = [
        _one(f"{core}linear_qkv.layer_norm_weight", f"{_HF}input_layernorm.weight"),
        Rule(f"{core}linear_qkv.weight", projections("weight"), split_qkv, join_qkv),
    ]
    if model.add_qkv_bias:
        found.append(Rule(f"{core}linear_qkv.bias", projections("bias"), split_qkv, join_qkv))
    return [*found, _one(f"{core}linear_proj.weight", f"{_HF}self_attn.o_proj.weight")]


def _gated(core: str, hf: str) -> list[Rule]:
    gate_and_up = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight")
    return [
        Rule(f"{core}linear_fc1.weight", gate_and_up, split_gated, join_stacked),
        _one(f"{core}linear_fc2.weight", f"{hf}down_proj.weight"),
    ]


def _dense() -> list[Rule]:
    core, hf = f"{_LAYER}mlp.", f"{_HF}mlp."
    return [_one(f"{core}linear_fc1.layer_norm_weight", f"{_HF}post_attention_layernorm.weight"), *_gated(core, hf)]


def _moe(model: ModelConfig) -> list[Rule]:
    core, hf = f"{_LAYER}mlp.", f"{_HF}mlp."
    found = [
        _one(f"{_LAYER}pre_mlp_layernorm.weight", f"{_HF}post_attention_layernorm.weight"),
        _one(f"{core}router.weight", f"{hf}gate.weight"),
        *_gated(f"{core}experts.experts.", f"{hf}experts.{{expert}}."),
    ]
    if model.moe_shared_expert_intermediate_size is not None:
        found += _gated(f"{core}shared_experts.", f"{hf}shared_expert.")
    if model.moe_shared_expert_gate:
        found.append(_one(f"{core}shared_experts.gate_weight", f"{hf}shared_expert_gate.weight"))
    return found


def mapped(model: ModelConfig) -> Iterator[Mapped]:
    """Every application of every rule, layer by layer."""
    table = rules(model)
    first_layer_rule = next(index for index, rule in enumerate(table) if rule.per_layer)
    for rule in table[:first_layer_rule]:
        yield Mapped(rule, (), rule.hf)
    for layer in range(model.num_layers):
        for rule in table:
            if rule.per_layer:
                yield from _in_layer(rule, layer, model)
    for rule in table[first_layer_rule:]:
        if not rule.per_layer:
            yield Mapped(rule, (), rule.hf)


def _in_layer(rule: Rule, layer: int, model: ModelConfig) -> Iterator[Mapped]:
    if not rule.per_expert:
        yield Mapped(rule, (layer,), tuple(name.format(layer=layer) for name in rule.hf))
        return
    for expert in range(model.num_moe_experts or 0):
        yield Mapped(rule, (layer, expert), tuple(name.format(layer=layer, expert=expert) for name in rule.hf))
