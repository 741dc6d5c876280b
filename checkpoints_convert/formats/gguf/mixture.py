"""Which type each tensor of a file gets: the mixtures of llama-quantize.

The rules are those of ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's src/llama-quant.cpp,
for the tensors that the Qwen family has. Tests compare them with llama-quantize itself.
"""

from checkpoints_convert.formats.gguf.names import EMBEDDING, OUTPUT, GgufTensor, layer_of
from checkpoints_convert.formats.gguf.types import GgmlType, Kind
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import Problem

# Qwen2 of 80 layers is "70B" to llama.cpp (src/models/qwen2.cpp): attn_v of its models is small and gets more bits.
_LAYERS_OF_70B = 80
# With eight experts (Mixtral 8x7B) attn_k and attn_v are a small part of the model and get Q8_0.
_EXPERTS_OF_MIXTRAL = 8
# Query heads per KV head from which Q2_K keeps attn_v in Q4_K.
_WIDE_GROUP = 4
_FALLBACK = {
    GgmlType.Q2_K: GgmlType.Q4_0,
    GgmlType.Q3_K: GgmlType.Q4_0,
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}


class Mixture:
    """The types of a kind of file.

    Args:
        kind: of the file.
        model: its shape.
        tied: whether the file has no ``output.weight``.
        importances: whether there is an importance matrix.
    """

    def __init__(self, kind: Kind, model: ModelConfig, *, tied: bool, importances: bool = False) -> None:
        self._kind, self._model, self._tied, self._importances = kind, model, tied, importances

    def type_of(self, tensor: GgufTensor) -> GgmlType | Problem:
        """The type of a tensor; a problem where the kind has none that holds its rows."""
        if not is_quantized(tensor):
            return GgmlType.F32
        base = self._kind.base
        if base in (GgmlType.F32, GgmlType.F16, GgmlType.BF16):
            return base
        wanted = self._wanted(tensor)
        found = wanted
        if tensor.columns % wanted.block_values:
            found = _FALLBACK.get(wanted, wanted)
            if wanted in _FALLBACK and tensor.columns % found.block_values:
                found = GgmlType.F16
        if tensor.columns % found.block_values:
            fix = f"columns are not a multiple of {found.block_values}, the values of a block of {found.name}; choose "
            return Problem(tensor.name, tensor.columns, f"{fix}F16, BF16 or F32.")
        return found

    def _wanted(self, tensor: GgufTensor) -> GgmlType:
        name, base = tensor.name, self._kind.base
        if name == OUTPUT or (self._tied and name == EMBEDDING):
            if tensor.columns % base.block_values:
                return GgmlType.Q8_0
            return base if base == GgmlType.Q8_0 else GgmlType.Q6_K
        if name == EMBEDDING:
            return base
        layer = layer_of(name)
        assert layer is not None, name
        if name.endswith(".attn_v.weight"):
            return self._attn_v(layer)
        if name.endswith(".attn_k.weight") and self._like_mixtral:
            return GgmlType.Q8_0
        if ".ffn_down" in name:
            return self._ffn_down(layer)
        if name.endswith(".attn_output.weight"):
            return self._attn_output()
        return base

    @property
    def _like_mixtral(self) -> bool:
        return self._model.num_moe_experts == _EXPERTS_OF_MIXTRAL

    def _attn_v(self, layer: int) -> GgmlType:
        found = self._kind.base
        match self._kind.name:
            case "Q2_K":
                group = self._model.num_attention_heads // self._model.num_query_groups
                found = GgmlType.Q4_K if group >= _WIDE_GROUP else GgmlType.Q3_K
            case "Q3_K_M":
                found = GgmlType.Q5_K if layer < 2 else GgmlType.Q4_K
            case "Q4_K_M" | "Q5_K_M" if self._more_bits(layer):
                found = GgmlType.Q6_K
        is_70b = self._model.num_layers == _LAYERS_OF_70B and not (self._model.is_moe or self._model.qk_layernorm)
        if is_70b and found in (GgmlType.Q3_K, GgmlType.Q4_K):
            found = GgmlType.Q5_K
        return GgmlType.Q8_0 if self._like_mixtral else found

    def _ffn_down(self, layer: int) -> GgmlType:
        layers = self._model.num_layers
        match self._kind.name:
            case "Q2_K":
                return GgmlType.Q3_K
            case "Q3_K_M":
                return GgmlType.Q5_K if layer < layers // 16 else GgmlType.Q4_K
            case "Q4_K_M" | "Q5_K_M" if self._more_bits(layer):
                return GgmlType.Q6_K
            case "Q4_0" if self._importances and layer < layers // 8:
                return GgmlType.Q4_1
        return self._kind.base

    def _attn_output(self) -> GgmlType:
        if self._like_mixtral:
            return GgmlType.Q5_K if self._kind.name in ("Q2_K", "Q3_K_M", "Q4_K_M") else self._kind.base
        return {"Q2_K": GgmlType.Q3_K, "Q3_K_M": GgmlType.Q4_K}.get(self._kind.name, self._kind.base)

    def _more_bits(self, layer: int) -> bool:
        """The first and last eighth of the layers, and every third between."""
        layers = self._model.num_layers
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def is_quantized(tensor: GgufTensor) -> bool:
    """Whether a tensor is stored in the kind's types; vectors, norms and the router stay F32."""
    return len(tensor.shape) > 1 and not tensor.name.endswith(".ffn_gate_inp.weight")
