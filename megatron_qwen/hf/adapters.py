"""The table between adapters in a checkpoint and the tensors of PEFT's files.

An adapter of a Hugging Face layer is two tensors, ``lora_A`` [rank, inputs] and ``lora_B`` [outputs, rank]. They belong
to one Hugging Face layer also where megatron-core computes several as one (``linear_qkv``, ``linear_fc1``), so a file
of PEFT holds the same tensors under other names.
"""

from collections.abc import Iterator, Mapping

from megatron_qwen.config.lora import EMBEDDING, HEAD, LoraConfig, LoraTarget, targets
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.hf.mapping import TensorMapping, tensor_mappings

PREFIX = "base_model.model."
# megatron-core's module of each Hugging Face module, inside a layer if layers have it; experts are below their list.
CORE_MODULES: Mapping[str, str] = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attention.linear_qkv"),
    "self_attn.o_proj": "self_attention.linear_proj",
    **{
        f"{theirs}.{part}": f"{ours}.{linear}"
        for theirs, ours in (
            ("mlp", "mlp"),
            ("mlp.experts", "mlp.experts.experts"),
            ("mlp.shared_expert", "mlp.shared_experts"),
        )
        for part, linear in (("gate_proj", "linear_fc1"), ("up_proj", "linear_fc1"), ("down_proj", "linear_fc2"))
    },
    EMBEDDING: "embedding.word_embeddings",
    HEAD: "output_layer",
}
# Suffix of the module that holds the adapters of a linear layer of megatron-core, beside it.
ADAPTERS = "_lora"
# PEFT has both matrices of an embedding's adapter the other way round, and gives them other names.
_OF_EMBEDDINGS = {"lora_A": "lora_embedding_B", "lora_B": "lora_embedding_A"}


def hf_module(target: LoraTarget) -> str:
    """Name of a Hugging Face module, with the placeholders ``{layer}`` and ``{expert}``."""
    if not target.per_layer:
        return {EMBEDDING: f"model.{EMBEDDING}", HEAD: HEAD}[target.name]
    place, part = target.name.rsplit(".", 1)
    return f"model.layers.{{layer}}.{place}{'.{expert}' if target.per_expert else ''}.{part}"


def adapter_tensor(target: LoraTarget, kind: str) -> str:
    """Name in a checkpoint of ``lora_A`` or ``lora_B`` of a kind of layer."""
    inside = "decoder.layers." if target.per_layer else ""
    return f"{inside}{CORE_MODULES[target.name]}{ADAPTERS}.{target.name.rsplit('.', 1)[-1]}.{kind}"


def adapter_mappings(lora: LoraConfig, model: ModelConfig) -> list[TensorMapping]:
    """The tensors that a run with adapters trains: adapters in the order of their layers, then whole matrices."""
    assert lora.rank is not None
    found = []
    for target in targets(lora, model):
        name = f"{PREFIX}{hf_module(target)}"
        for kind, rows, width in (("lora_A", lora.rank, target.inputs), ("lora_B", target.outputs, lora.rank)):
            theirs = f"{name}.{_OF_EMBEDDINGS[kind]}" if target.name == EMBEDDING else f"{name}.{kind}.weight"
            padded = kind == "lora_B" and not target.per_layer
            found.append(TensorMapping(adapter_tensor(target, kind), (theirs,), (((0, rows),),), width, padded))
    return found + [mapping for _, mapping in saved_matrices(lora, model)]


def turned_in_peft(name: str) -> bool:
    """Whether PEFT's file holds a tensor with rows and columns exchanged, by its name there."""
    return name.endswith(tuple(_OF_EMBEDDINGS.values()))


def saved_matrices(lora: LoraConfig, model: ModelConfig) -> Iterator[tuple[str, TensorMapping]]:
    """Vocabulary matrices that are trained whole: their names in ``lora.modules_to_save`` and where they are."""
    own = {EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight"}
    table = {mapping.hf: mapping for mapping in tensor_mappings(model)}
    for name in lora.modules_to_save:
        mapping = table[(own[name],)]
        yield name, TensorMapping(mapping.core, (f"{PREFIX}{own[name]}",), mapping.rows, mapping.width, mapping.padded)
