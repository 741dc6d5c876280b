"""The section ``lora`` of a configuration: low-rank adapters, and which linear layers get one.

The fields and the names of layers are those of PEFT's LoraConfig and of Hugging Face models.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt

from megatron_qwen.config.fields import setting
from megatron_qwen.config.sections import ModelConfig

ALL_LINEAR = "all-linear"
EMBEDDING, HEAD = "embed_tokens", "lm_head"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) on a model whose own weights stay as they are (docs/lora.md)."""

    rank: int | None = setting(
        None, doc="Rank of every adapter; null trains all weights. Needs checkpoint.load.", minimum=1
    )
    alpha: float = setting(16.0, doc="Numerator of an adapter's scale, alpha / rank.", above=0.0)
    use_rslora: bool = setting(False, doc="Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).")
    dropout: float = setting(0.0, doc="Dropout of what goes into an adapter.", minimum=0.0, below=1.0)
    target_modules: tuple[str, ...] = setting(
        (ALL_LINEAR,),
        doc="What gets an adapter: all-linear (all but the vocabulary's matrices), or names (q_proj, lm_head) and "
        "patterns (self_attn.*, mlp.experts.*) of Hugging Face modules.",
    )
    modules_to_save: tuple[str, ...] = setting(
        (), doc="Vocabulary matrices that are trained whole, beside the adapters: embed_tokens, lm_head."
    )

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        rank = self.rank or 1
        return self.alpha / (sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class LoraTarget:
    """A kind of linear layer, of which every layer of a model (and every expert of it) has one; or a vocabulary matrix.

    Args:
        name: of the Hugging Face module, inside a layer if layers have it, as ``self_attn.q_proj`` or ``lm_head``.
        inputs: columns of its weight: features of its input, and of an embedding those of its output.
        outputs: rows of its weight.
    """

    name: str
    inputs: int
    outputs: int

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return self.name not in (EMBEDDING, HEAD)

    @property
    def per_expert(self) -> bool:
        """Whether every routed expert has one."""
        return ".experts." in self.name


def possible_targets(model: ModelConfig) -> tuple[LoraTarget, ...]:
    """Everything in a model that can have an adapter, in the order of transformers' modules.

    Of tied embeddings one matrix is both: an adapter of either would change what the other computes.
    """
    layers = linear_layers(model)
    if model.share_embeddings_and_output_weights:
        return layers
    vocabulary = (model.hidden_size, model.vocab_size)
    return (LoraTarget(EMBEDDING, *vocabulary), *layers, LoraTarget(HEAD, *vocabulary))


def linear_layers(model: ModelConfig) -> tuple[LoraTarget, ...]:
    """Those inside its layers: what ``all-linear`` means."""
    h, d = model.hidden_size, model.head_dim
    query, kv = model.num_attention_heads * d, model.num_query_groups * d
    sizes = {"q_proj": (h, query), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (query, h)}
    found = [LoraTarget(f"self_attn.{name}", *size) for name, size in sizes.items()]
    if not model.is_moe:
        return (*found, *_gated("mlp", h, model.ffn_hidden_size))
    found += _gated("mlp.experts", h, model.moe_ffn_hidden_size or 0)
    if model.moe_shared_expert_intermediate_size is not None:
        found += _gated("mlp.shared_expert", h, model.moe_shared_expert_intermediate_size)
    return tuple(found)


def _gated(place: str, hidden: int, ffn: int) -> list[LoraTarget]:
    return [
        LoraTarget(f"{place}.gate_proj", hidden, ffn),
        LoraTarget(f"{place}.up_proj", hidden, ffn),
        LoraTarget(f"{place}.down_proj", ffn, hidden),
    ]


def matches(target: LoraTarget, pattern: str) -> bool:
    """Whether a module is meant: by its name, its end as in PEFT (``q_proj``), or a pattern with ``*``."""
    if pattern == ALL_LINEAR:
        return target.per_layer
    return target.name.endswith(f".{pattern}") or fnmatchcase(target.name, pattern)


def targets(lora: LoraConfig, model: ModelConfig) -> tuple[LoraTarget, ...]:
    """What gets an adapter; nothing where ``lora.rank`` is null."""
    if lora.rank is None:
        return ()
    return tuple(
        one for one in possible_targets(model) if any(matches(one, pattern) for pattern in lora.target_modules)
    )
