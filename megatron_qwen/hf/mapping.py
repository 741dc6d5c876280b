"""The one table between megatron-core's tensors and Hugging Face's, for both directions.

Every Hugging Face tensor is a choice of rows of one tensor of the checkpoint. A rule names that tensor (layers
and experts are its leading dimensions) and says which rows go where, so a conversion only ever moves rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_qwen.config.sections import ModelConfig

Range = tuple[int, int]


@dataclass(frozen=True)
class Rule:
    """One tensor of the checkpoint and what it is in Hugging Face.

    Args:
        core: name in the checkpoint; ``decoder.layers.`` and ``experts.experts.`` stand for leading dimensions.
        hf: Hugging Face names, with ``{layer}`` and ``{expert}``.
        rows: for each of them the rows of the checkpoint tensor it is made of, in its order.
        width: columns; None for a vector.
        padded: more rows may follow in the checkpoint, which pad the vocabulary.
    """

    core: str
    hf: tuple[str, ...]
    rows: tuple[tuple[Range, ...], ...]
    width: int | None
    padded: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether the first dimension counts layers."""
        return ".layers." in self.core

    @property
    def per_expert(self) -> bool:
        """Whether the second dimension counts experts."""
        return ".experts." in self.core

    @property
    def num_rows(self) -> int:
        """Rows of the checkpoint tensor, without padding."""
        return sum(stop - start for ranges in self.rows for start, stop in ranges)

    def shape(self, part: int) -> tuple[int, ...]:
        """Shape of one of the Hugging Face tensors."""
        rows = sum(stop - start for start, stop in self.rows[part])
        return (rows,) if self.width is None else (rows, self.width)

    @property
    def core_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor without leading dimensions and padding."""
        return (self.num_rows,) if self.width is None else (self.num_rows, self.width)

    def origin(self) -> list[tuple[int, Range]]:
        """The checkpoint tensor from top to bottom: (which Hugging Face tensor, which of its rows)."""
        found: list[tuple[int, int, Range]] = []
        for part, ranges in enumerate(self.rows):
            starts = accumulate((stop - start for start, stop in ranges), initial=0)
            found += [(core[0], part, span) for core, span in zip(ranges, pairwise(starts), strict=True)]
        return [(part, span) for _, part, span in sorted(found)]


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor and where it comes from.

    Args:
        name: such as ``model.layers.3.self_attn.q_proj.weight``.
        rule: the rule that yields it.
        leading: index of the layer, and of the expert, in the checkpoint tensor.
        part: which of the rule's tensors it is.
    """

    name: str
    rule: Rule
    leading: tuple[int, ...]
    part: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.rule.shape(self.part)

    @property
    def rows(self) -> tuple[Range, ...]:
        """Rows of the checkpoint tensor it is made of."""
        return self.rule.rows[self.part]


@dataclass(frozen=True)
class CoreTensor:
    """A tensor of the checkpoint at one index of its leading dimensions.

    Args:
        rule: the rule.
        leading: index of the layer, and of the expert.
        names: the Hugging Face tensors it is made of, in the order of the rule.
    """

    rule: Rule
    leading: tuple[int, ...]
    names: tuple[str, ...]


def rules(model: ModelConfig) -> list[Rule]:
    """The rules of a model, in the order of the checkpoint's tensors."""
    h = model.hidden_size
    found = [_whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", model.vocab_size, h, padded=True)]
    found += _attention(model) + (_moe(model) if model.is_moe else _dense(model))
    found.append(_whole("decoder.final_layernorm.weight", "model.norm.weight", h))
    if not model.share_embeddings_and_output_weights:
        found.append(_whole("output_layer.weight", "lm_head.weight", model.vocab_size, h, padded=True))
    return found


_LAYER, _HF = "decoder.layers.", "model.layers.{layer}."


def _whole(core: str, hf: str, rows: int, width: int | None = None, *, padded: bool = False) -> Rule:
    return Rule(core, (hf,), (((0, rows),),), width, padded)


def _attention(model: ModelConfig) -> list[Rule]:
    core, hf, h, d = f"{_LAYER}self_attention.", f"{_HF}self_attn.", model.hidden_size, model.head_dim

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"{hf}{part}_proj.{kind}" for part in "qkv")

    # The core keeps each KV head beside the query heads it serves, so that TP cuts between groups.
    heads = model.num_attention_heads // model.num_query_groups
    starts = [group * (heads + 2) * d for group in range(model.num_query_groups)]
    query = tuple((start, start + heads * d) for start in starts)
    key = tuple((start + heads * d, start + (heads + 1) * d) for start in starts)
    value = tuple((start + (heads + 1) * d, start + (heads + 2) * d) for start in starts)
    found = [
        _whole(f"{core}linear_qkv.layer_norm_weight", f"{_HF}input_layernorm.weight", h),
        Rule(f"{core}linear_qkv.weight", projections("weight"), (query, key, value), h),
    ]
    if model.add_qkv_bias:
        found.append(Rule(f"{core}linear_qkv.bias", projections("bias"), (query, key, value), None))
    if model.qk_layernorm:
        found += [_whole(f"{core}{part}_layernorm.weight", f"{hf}{part}_norm.weight", d) for part in "qk"]
    return [*found, _whole(f"{core}linear_proj.weight", f"{hf}o_proj.weight", h, model.num_attention_heads * d)]


def _gated(core: str, hf: str, hidden: int, ffn: int) -> list[Rule]:
    gate_and_up = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight")
    return [
        Rule(f"{core}linear_fc1.weight", gate_and_up, (((0, ffn),), ((ffn, 2 * ffn),)), hidden),
        _whole(f"{core}linear_fc2.weight", f"{hf}down_proj.weight", hidden, ffn),
    ]


def _dense(model: ModelConfig) -> list[Rule]:
    core, hf, h = f"{_LAYER}mlp.", f"{_HF}mlp.", model.hidden_size
    norm = _whole(f"{core}linear_fc1.layer_norm_weight", f"{_HF}post_attention_layernorm.weight", h)
    return [norm, *_gated(core, hf, h, model.ffn_hidden_size)]


def _moe(model: ModelConfig) -> list[Rule]:
    core, hf, h = f"{_LAYER}mlp.", f"{_HF}mlp.", model.hidden_size
    assert model.num_moe_experts is not None
    assert model.moe_ffn_hidden_size is not None
    found = [
        _whole(f"{_LAYER}pre_mlp_layernorm.weight", f"{_HF}post_attention_layernorm.weight", h),
        _whole(f"{core}router.weight", f"{hf}gate.weight", model.num_moe_experts, h),
        *_gated(f"{core}experts.experts.", f"{hf}experts.{{expert}}.", h, model.moe_ffn_hidden_size),
    ]
    if model.moe_shared_expert_intermediate_size is not None:
        found += _gated(f"{core}shared_experts.", f"{hf}shared_expert.", h, model.moe_shared_expert_intermediate_size)
    if model.moe_shared_expert_gate:
        found.append(_whole(f"{core}shared_experts.gate_weight", f"{hf}shared_expert_gate.weight", 1, h))
    return found


def core_tensors(model: ModelConfig) -> Iterator[CoreTensor]:
    """Every application of every rule, layer by layer."""
    table = rules(model)
    first = next(index for index, rule in enumerate(table) if rule.per_layer)
    for rule in table[:first]:
        yield CoreTensor(rule, (), rule.hf)
    for layer in range(model.num_layers):
        for rule in table:
            if rule.per_layer:
                yield from _in_layer(rule, layer, model)
    for rule in table[first:]:
        if not rule.per_layer:
            yield CoreTensor(rule, (), rule.hf)


def _in_layer(rule: Rule, layer: int, model: ModelConfig) -> Iterator[CoreTensor]:
    if not rule.per_expert:
        yield CoreTensor(rule, (layer,), tuple(name.format(layer=layer) for name in rule.hf))
        return
    for expert in range(model.num_moe_experts or 0):
        names = tuple(name.format(layer=layer, expert=expert) for name in rule.hf)
        yield CoreTensor(rule, (layer, expert), names)


def count_hf_tensors(model: ModelConfig) -> int:
    """How many Hugging Face tensors there are, without naming them."""
    times = {True: model.num_layers, False: 1}
    experts = {True: model.num_moe_experts or 0, False: 1}
    return sum(len(rule.hf) * times[rule.per_layer] * experts[rule.per_expert] for rule in rules(model))


# Modules of a layer in the order in which transformers holds them, and so writes them.
_MODULES = (
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{part}" for part in ("gate", "experts")),
    *(f"mlp.shared_expert.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    "mlp.shared_expert_gate",
    *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm",
    "post_attention_layernorm",
)
_AROUND_LAYERS = {"model.embed_tokens.weight": 0, "model.norm.weight": 2, "lm_head.weight": 3}


def hf_tensors(model: ModelConfig) -> list[HfTensor]:
    """Every Hugging Face tensor, in the order of transformers' modules, which decides what file each goes to."""
    found = [
        HfTensor(name, item.rule, item.leading, part)
        for item in core_tensors(model)
        for part, name in enumerate(item.names)
    ]
    return sorted(found, key=lambda item: _place(item.name))


def _place(name: str) -> tuple[int, ...]:
    if name in _AROUND_LAYERS:
        return (_AROUND_LAYERS[name],)
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    if module.startswith("mlp.experts."):
        _, _, expert, projection = module.split(".")
        return 1, int(layer), _MODULES.index("mlp.experts"), int(expert), _MODULES.index(f"mlp.{projection}")
    return 1, int(layer), _MODULES.index(module), 0 if kind == "weight" else 1
