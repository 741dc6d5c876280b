"""The tensors of a GGUF file of the Qwen family, and the Hugging Face tensors that they hold.

Names as in llama.cpp's conversion of Qwen (gguf-py/gguf/tensor_mapping.py): no rows of Q and K are permuted, and the
experts of a layer are stacked in one tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.hf.mapping import hf_tensors

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_HF_EMBEDDING, _HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOP = {_HF_EMBEDDING: EMBEDDING, "model.norm.weight": "output_norm.weight", _HF_HEAD: OUTPUT}
# What follows model.layers.N. and what follows blk.N.
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_EXPERTS = "mlp.experts."


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Args:
        name: in the file.
        shape: [columns], [rows, columns] or [experts, rows, columns]; a file says it in the opposite order.
        sources: the Hugging Face tensors that it is made of, one behind the other; one of each expert.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def columns(self) -> int:
        """Values of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of all experts."""
        rows = 1
        for length in self.shape[:-1]:
            rows *= length
        return rows


def gguf_name(name: str) -> str:
    """The tensor of a file that holds a Hugging Face tensor."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    if rest.startswith(_EXPERTS):
        return f"blk.{layer}.{_EXPERT[rest.split('.')[3]]}.weight"
    module, _, part = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER[module]}.{part}"


def gguf_tensors(model: ModelConfig) -> list[GgufTensor]:
    """The tensors of a model's file, in the order of the layers.

    A tied model has no ``output.weight``. llama.cpp's qwen2moe asks for one (``output`` is required in
    src/models/qwen2moe.cpp), so there it is written again.
    """
    found: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for item in hf_tensors(model):
        name = gguf_name(item.name)
        found.setdefault(name, []).append(item.name)
        shapes[name] = item.shape
    if OUTPUT not in found and model.is_moe and not model.qk_layernorm:
        found[OUTPUT], shapes[OUTPUT] = [_HF_EMBEDDING], shapes[EMBEDDING]
    return sorted((_tensor(name, shapes[name], tuple(sources)) for name, sources in found.items()), key=_place)


def _tensor(name: str, shape: tuple[int, ...], sources: tuple[str, ...]) -> GgufTensor:
    if name.endswith("_exps.weight"):
        shape = (len(sources), *shape)
    elif name.endswith(".ffn_gate_inp_shexp.weight"):  # [1, hidden] in Hugging Face, a vector here
        shape = shape[-1:]
    return GgufTensor(name, shape, sources)


def layer_of(name: str) -> int | None:
    """The layer of a tensor of a file; None of embedding, final norm and output."""
    return int(name.split(".")[1]) if name.startswith("blk.") else None


def _place(tensor: GgufTensor) -> tuple[int, int]:
    layer = layer_of(tensor.name)
    if layer is None:
        return (0, 0) if tensor.name == EMBEDDING else (2, 0)
    return 1, layer


def sources_by_name(model: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Of every Hugging Face tensor its name, the tensor that holds it, and its number among the sources of that."""
    for tensor in gguf_tensors(model):
        for number, source in enumerate(tensor.sources):
            if not (tensor.name == OUTPUT and source == _HF_EMBEDDING):
                yield source, tensor.name, number
