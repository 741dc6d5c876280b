"""Scales that a method moved from one layer to the next before it rounded, and what the weights are without them.

AWQ and SmoothQuant multiply the columns of a weight by a diagonal and divide what makes its inputs by the same: the
norm before q, k, v or gate, up, the rows of up_proj before down_proj, the rows of v_proj before o_proj. The model
computes the same function, and its weights differ. https://arxiv.org/abs/2306.00978, https://arxiv.org/abs/2211.10438
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.config.sections import ModelConfig

_INPUT_NORM, _POST_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
# Of a norm that was cast from one 16-bit format to another.
_SAME_NORM = 2.0**-7


@dataclass
class Folds:
    """Factors between a model and its quantized release.

    Args:
        norms: by the name of a norm that was changed, float32 [hidden]: the original's weights by the release's.
        rows: by the name of a weight, float32 [out]: what its rows were multiplied by, as far as known.
        heads_per_group: query heads of a KV head.
        head_dim: of a head.
    """

    norms: Mapping[str, torch.Tensor]
    heads_per_group: int
    head_dim: int
    rows: dict[str, torch.Tensor] = field(default_factory=dict)

    def columns(self, name: str) -> torch.Tensor | None:
        """What the columns of the original's weight are to be multiplied by, float32 [in]; None: by nothing."""
        partner = partner_of(name)
        if partner is None:
            return self.norms.get(norm_before(name) or "")
        factors = self.rows.get(partner)
        if factors is None:
            return None
        if name.endswith("o_proj.weight"):
            factors = factors.view(-1, self.head_dim).repeat_interleave(self.heads_per_group, dim=0).flatten()
        return 1 / factors


def find_folds(reference: TensorSet, quantized: TensorSet, model: ModelConfig) -> Folds:
    """Reads all norms before layers, and notes those that differ by more than their dtypes."""
    norms = {}
    for name, info in reference.tensors.items():
        other = quantized.tensors.get(name)
        if name.endswith((_INPUT_NORM, _POST_NORM)) and other is not None and other.shape == info.shape:
            ours, theirs = (side.rows(name, 0, info.shape[0]).float() for side in (reference, quantized))
            if not bool(((ours - theirs).abs() <= _SAME_NORM * ours.abs()).all()):
                norms[name] = ours / theirs
    return Folds(norms, model.num_attention_heads // model.num_query_groups, model.head_dim)


def norm_before(name: str) -> str | None:
    """The norm whose output is the input of a weight (or router, or gate of a shared expert); None of the others."""
    parts = name.split(".")
    if len(parts) < 5 or parts[:2] != ["model", "layers"]:
        return None
    layer, module = ".".join(parts[:3]), parts[-2]
    if parts[3] == "self_attn" and module in ("q_proj", "k_proj", "v_proj"):
        return f"{layer}.{_INPUT_NORM}"
    if parts[3] == "mlp" and module in ("gate_proj", "up_proj", "gate", "shared_expert_gate"):
        return f"{layer}.{_POST_NORM}"
    return None


def partner_of(name: str) -> str | None:
    """The weight whose rows are the columns of a weight: up_proj of down_proj, v_proj of o_proj; None of the others."""
    for later, earlier in (("down_proj.weight", "up_proj.weight"), ("o_proj.weight", "v_proj.weight")):
        if name.endswith(f".{later}"):
            return name.removesuffix(later) + earlier
    return None
