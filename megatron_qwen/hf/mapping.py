"""The table between megatron-core's tensors and Hugging Face's, used in both directions.

Every Hugging Face tensor is a selection of rows of one tensor of the checkpoint. There are three kinds of mapping,
named as in Megatron-Bridge:

- direct: one tensor is one tensor (norms, embeddings, output projections, the router).
- QKV: ``linear_qkv`` holds ``q_proj``, ``k_proj`` and ``v_proj``, interleaved by KV head.
- gated MLP: ``linear_fc1`` holds ``gate_proj`` above ``up_proj``; ``linear_fc2`` is ``down_proj``.

A mapping names the checkpoint tensor (layers and experts are its leading dimensions) and the rows of each Hugging Face
tensor, so a conversion only moves rows and never computes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_qwen.config.sections import ModelConfig

Range = tuple[int, int]


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of the checkpoint and the Hugging Face tensors that it holds.

    Args:
        core: name in the checkpoint; names with ``decoder.layers.`` and ``experts.experts.`` have a leading dimension
            for layers and one for experts.
        hf: Hugging Face names, with the placeholders ``{layer}`` and ``{expert}``.
        rows: for each Hugging Face tensor, the ranges of rows of the checkpoint tensor that make it up, in its order.
        width: columns; None for a vector.
        padded: whether vocabulary padding may follow in the checkpoint.
    """

    core: str
    hf: tuple[str, ...]
    rows: tuple[tuple[Range, ...], ...]
    width: int | None
    padded: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether the first dimension is the layer."""
        return ".layers." in self.core

    @property
    def per_expert(self) -> bool:
        """Whether the second dimension is the expert."""
        return ".experts." in self.core

    @property
    def num_rows(self) -> int:
        """Rows of the checkpoint tensor, without padding."""
        return sum(stop - start for ranges in self.rows for start, stop in ranges)

    def shape(self, part: int) -> tuple[int, ...]:
        """Shape of Hugging Face tensor number ``part``: (rows,) or (rows, width)."""
        rows = sum(stop - start for start, stop in self.rows[part])
        return (rows,) if self.width is None else (rows, self.width)

    @property
    def core_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor without leading dimensions and padding."""
        return (self.num_rows,) if self.width is None else (self.num_rows, self.width)

    def origin(self) -> list[tuple[int, Range]]:
        """The checkpoint tensor from first to last row: (number of the Hugging Face tensor, range of its rows)."""
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
        mapping: the mapping that contains it.
        leading: index of the layer, and of the expert, in the checkpoint tensor.
        part: its number in ``mapping.hf``.
    """

    name: str
    mapping: TensorMapping
    leading: tuple[int, ...]
    part: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows,) or (rows, width)."""
        return self.mapping.shape(self.part)

    @property
    def rows(self) -> tuple[Range, ...]:
        """Ranges of rows of the checkpoint tensor that make it up."""
        return self.mapping.rows[self.part]


@dataclass(frozen=True)
class CoreTensor:
    """A tensor of the checkpoint at one index of its leading dimensions.

    Args:
        mapping: the mapping of the whole tensor.
        leading: index of the layer, and of the expert.
        names: the Hugging Face tensors that it holds, in the order of ``mapping.hf``.
    """

    mapping: TensorMapping
    leading: tuple[int, ...]
    names: tuple[str, ...]


def tensor_mappings(model: ModelConfig) -> list[TensorMapping]:
    """The mappings of a model, in the order of the checkpoint's tensors."""
    h = model.hidden_size
    found = [_direct("embedding.word_embeddings.weight", "model.embed_tokens.weight", model.vocab_size, h, padded=True)]
    found += _attention(model) + (_moe(model) if model.is_moe else _dense(model))
    found.append(_direct("decoder.final_layernorm.weight", "model.norm.weight", h))
    if not model.share_embeddings_and_output_weights:
        found.append(_direct("output_layer.weight", "lm_head.weight", model.vocab_size, h, padded=True))
    return found


_LAYER, _HF = "decoder.layers.", "model.layers.{layer}."


def _direct(core: str, hf: str, rows: int, width: int | None = None, *, padded: bool = False) -> TensorMapping:
    """Direct mapping: one checkpoint tensor is one Hugging Face tensor."""
    return TensorMapping(core, (hf,), (((0, rows),),), width, padded)


def _qkv(core: str, hf: str, model: ModelConfig, width: int | None) -> TensorMapping:
    """QKV mapping: rows of the checkpoint are grouped by KV head, each group [its query heads, key head, value head].

    For 4 query heads and 2 KV heads: q0 q1 k0 v0 | q2 q3 k1 v1, each of head_dim rows. megatron-core keeps this order
    so that tensor parallelism can cut between groups. Hugging Face has a tensor for all query heads, one for all key
    heads and one for all value heads.

    Args:
        core: name in the checkpoint.
        hf: name in Hugging Face, with ``{}`` for q, k and v.
        model: the architecture.
        width: columns; None for the bias.
    """
    d, heads = model.head_dim, model.num_attention_heads // model.num_query_groups
    starts = [group * (heads + 2) * d for group in range(model.num_query_groups)]
    query = tuple((start, start + heads * d) for start in starts)
    key = tuple((start + heads * d, start + (heads + 1) * d) for start in starts)
    value = tuple((start + (heads + 1) * d, start + (heads + 2) * d) for start in starts)
    names = tuple(hf.replace("{}", part) for part in "qkv")
    return TensorMapping(core, names, (query, key, value), width)


def _attention(model: ModelConfig) -> list[TensorMapping]:
    core, hf, h, d = f"{_LAYER}self_attention.", f"{_HF}self_attn.", model.hidden_size, model.head_dim
    found = [
        # Named after Transformer Engine's fused norm + linear; the torch backend saves its norm under the same name.
        _direct(f"{core}linear_qkv.layer_norm_weight", f"{_HF}input_layernorm.weight", h),
        _qkv(f"{core}linear_qkv.weight", f"{hf}{{}}_proj.weight", model, h),
    ]
    if model.add_qkv_bias:
        found.append(_qkv(f"{core}linear_qkv.bias", f"{hf}{{}}_proj.bias", model, None))
    if model.qk_layernorm:
        found += [_direct(f"{core}{part}_layernorm.weight", f"{hf}{part}_norm.weight", d) for part in "qk"]
    return [*found, _direct(f"{core}linear_proj.weight", f"{hf}o_proj.weight", h, model.num_attention_heads * d)]


def _gated_mlp(core: str, hf: str, hidden: int, ffn: int) -> list[TensorMapping]:
    """Gated MLP mapping: ``linear_fc1`` is [gate; up], 2 x ffn rows; ``linear_fc2`` is down."""
    gate_and_up = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight")
    return [
        TensorMapping(f"{core}linear_fc1.weight", gate_and_up, (((0, ffn),), ((ffn, 2 * ffn),)), hidden),
        _direct(f"{core}linear_fc2.weight", f"{hf}down_proj.weight", hidden, ffn),
    ]


def _dense(model: ModelConfig) -> list[TensorMapping]:
    core, hf, h = f"{_LAYER}mlp.", f"{_HF}mlp.", model.hidden_size
    norm = _direct(f"{core}linear_fc1.layer_norm_weight", f"{_HF}post_attention_layernorm.weight", h)
    return [norm, *_gated_mlp(core, hf, h, model.ffn_hidden_size)]


def _moe(model: ModelConfig) -> list[TensorMapping]:
    core, hf, h = f"{_LAYER}mlp.", f"{_HF}mlp.", model.hidden_size
    assert model.num_moe_experts is not None
    assert model.moe_ffn_hidden_size is not None
    found = [
        _direct(f"{_LAYER}pre_mlp_layernorm.weight", f"{_HF}post_attention_layernorm.weight", h),
        _direct(f"{core}router.weight", f"{hf}gate.weight", model.num_moe_experts, h),
        *_gated_mlp(f"{core}experts.experts.", f"{hf}experts.{{expert}}.", h, model.moe_ffn_hidden_size),
    ]
    if model.moe_shared_expert_intermediate_size is not None:
        found += _gated_mlp(
            f"{core}shared_experts.", f"{hf}shared_expert.", h, model.moe_shared_expert_intermediate_size
        )
    if model.moe_shared_expert_gate:
        found.append(_direct(f"{core}shared_experts.gate_weight", f"{hf}shared_expert_gate.weight", 1, h))
    return found


def core_tensors(model: ModelConfig, table: Sequence[TensorMapping] | None = None) -> Iterator[CoreTensor]:
    """Every tensor of the checkpoint at every index of its leading dimensions, layer by layer.

    Args:
        model: the shape.
        table: what the checkpoint holds; None is the model.
    """
    table = tensor_mappings(model) if table is None else table
    first = next((index for index, mapping in enumerate(table) if mapping.per_layer), len(table))
    for mapping in table[:first]:
        yield CoreTensor(mapping, (), mapping.hf)
    for layer in range(model.num_layers):
        for mapping in table:
            if mapping.per_layer:
                yield from _in_layer(mapping, layer, model)
    for mapping in table[first:]:
        if not mapping.per_layer:
            yield CoreTensor(mapping, (), mapping.hf)


def _in_layer(mapping: TensorMapping, layer: int, model: ModelConfig) -> Iterator[CoreTensor]:
    if not mapping.per_expert:
        yield CoreTensor(mapping, (layer,), tuple(name.format(layer=layer) for name in mapping.hf))
        return
    for expert in range(model.num_moe_experts or 0):
        names = tuple(name.format(layer=layer, expert=expert) for name in mapping.hf)
        yield CoreTensor(mapping, (layer, expert), names)


def count_hf_tensors(model: ModelConfig) -> int:
    """Number of Hugging Face tensors, without making their names (there may be many thousands)."""
    times = {True: model.num_layers, False: 1}
    experts = {True: model.num_moe_experts or 0, False: 1}
    return sum(
        len(mapping.hf) * times[mapping.per_layer] * experts[mapping.per_expert] for mapping in tensor_mappings(model)
    )


# Modules of a layer in the order in which transformers registers and therefore writes them. It decides which tensors
# share a file of an export.
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
    """Every Hugging Face tensor, in the order of transformers' modules, which decides the file that each goes to."""
    found = [
        HfTensor(name, item.mapping, item.leading, part)
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
