"""How experts are made from a dense feed-forward, and whether that preserves the function of the dense model.

A SwiGLU feed-forward of width F is a sum over its channels: down[:, c] x silu(gate[c] . x) x (up[c] . x). Cut into G
slices, the slices' outputs add up to the whole. The first experts are slices 0 to G - 1, the next G the same again,
and so on; the experts of one such group have the same router row, so that a token that prefers one of them is
sent to all of the group and meets every slice once (He et al. 2024, arXiv 2410.07524, call this virtual groups).
Qwen1.5-MoE starts from a dense model cut this way (Qwen1.5-MoE blog post, March 2024).
"""

import math
from dataclasses import dataclass, replace

from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem

# Standard deviation of the router's logits where their size changes the function: so small that its softmax is nearly
# flat, and large enough for fp32 to tell one group from the next.
_FLAT_LOGITS = 1e-3


@dataclass(frozen=True)
class UpcyclePlan:
    """What goes where.

    Args:
        model: the shape of the MoE model.
        slices: G, slices the routed experts share the dense channels in.
        first_channel: first dense channel that the routed experts hold.
        shared_channels: dense channels that the shared expert holds, from 0.
        routed_scale: factor on the routed experts' output matrices.
        shared_scale: factor on the shared expert's.
        router_std: standard deviation of the router's rows.
        exact: whether the MoE model computes what the dense model does, up to rounding.
        nearly: whether it does so up to what a nearly flat router adds, a part in a thousand of the routed output.
        notes: in words, what is exact and what cannot be.
    """

    model: ModelConfig
    slices: int
    first_channel: int
    shared_channels: int
    routed_scale: float
    shared_scale: float
    router_std: float
    exact: bool
    nearly: bool
    notes: tuple[str, ...]

    def group(self, expert: int) -> int:
        """Experts of one group have one router row."""
        return expert // self.slices

    def channels(self, expert: int) -> tuple[int, int]:
        """Dense channels of a routed expert; those beyond the dense width are padding."""
        width = self.model.moe_ffn_hidden_size or 0
        start = self.first_channel + expert % self.slices * width
        return start, start + width


def mixture_shape(dense: ModelConfig, recipe: ModelConfig) -> ModelConfig:
    """The dense model's shape with the recipe's experts.

    Raises:
        ConversionError: the recipe is not an MoE model, or has another shape apart from its experts.
    """
    if dense.is_moe:
        raise ConversionError(Problem("DENSE", None, "is already a mixture-of-experts (MoE) model."))
    if not recipe.is_moe:
        raise ConversionError(
            Problem("--recipe", None, "is not a mixture-of-experts (MoE) model; choose one (mq recipes).")
        )
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "qk_layernorm")
    problems = [
        Problem(f"model.{name}", getattr(recipe, name), f"the dense model has {getattr(dense, name)}; override it.")
        for name in names
        if getattr(dense, name) != getattr(recipe, name)
    ]
    if problems:
        raise ConversionError(problems)
    experts = {
        name: getattr(recipe, name)
        for name in (
            "num_moe_experts",
            "moe_router_topk",
            "moe_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_router_pre_softmax",
            "moe_router_load_balancing_type",
            "moe_aux_loss_coeff",
            "moe_z_loss_coeff",
        )
    }
    return replace(dense, **experts)


def plan(
    dense: ModelConfig, recipe: ModelConfig, *, router_std: float | None = None, routed_share: float = 0.5
) -> UpcyclePlan:
    """Decides which channels go where and how outputs are scaled.

    Args:
        dense: the dense model.
        recipe: the MoE model; its experts count.
        router_std: of the router's rows; None is the model's initialisation, or nearly zero where it must be flat.
        routed_share: part of the output that the routed experts give where the shared expert holds the whole too.

    Raises:
        ConversionError: the shapes do not go together.
    """
    model = mixture_shape(dense, recipe)
    assert model.num_moe_experts is not None
    assert model.moe_ffn_hidden_size is not None
    experts, topk, width = model.num_moe_experts, model.moe_router_topk, model.moe_ffn_hidden_size
    ffn, shared = dense.ffn_hidden_size, model.moe_shared_expert_intermediate_size or 0
    shared_holds_all = shared >= ffn
    first = 0 if shared_holds_all else shared
    slices = math.ceil((ffn - first) / width)
    notes: list[str] = []
    covered = _covered(experts, topk, slices, notes)
    renormalised = not model.moe_router_pre_softmax
    # The chosen experts' weights: with renormalisation they sum to one; else a flat softmax gives each 1 / experts.
    full = slices if renormalised else experts * slices / topk
    share = 1.0
    if shared_holds_all:
        share = routed_share if covered else 0.0
        notes.append(
            f"the shared expert holds the whole feed-forward too and gives {1 - share:.0%} of the output"
            if share
            else "the shared expert gives the whole output; the routed experts start with output matrices of zero"
        )
    elif shared:
        notes.append(f"the shared expert holds channels 0 to {shared - 1}, the routed experts the rest")
    if width * slices > ffn - first:
        notes.append(f"{width * slices - (ffn - first)} channels of a group are padding with zero output")
    std = router_std if router_std is not None else dense.init_method_std
    flat = not renormalised and share > 0
    if flat:
        std = router_std if router_std is not None else _FLAT_LOGITS / math.sqrt(model.hidden_size)
        notes.append(
            "not exact: the router's weights are not renormalised, so the routed output scales with its softmax; its "
            f"rows are drawn with std {std:.2g}, which keeps that nearly flat"
            + (" (--routed-share 0 is exact)" if shared_holds_all else "")
        )
    possible = covered or shared_holds_all
    gate = 2.0 if model.moe_shared_expert_gate else 1.0
    if model.moe_shared_expert_gate:
        notes.append("the shared expert's gate starts at zero, a sigmoid of one half, and its output matrix is doubled")
    return UpcyclePlan(
        model=model,
        slices=slices,
        first_channel=first,
        shared_channels=min(shared, ffn),
        routed_scale=full * share,
        shared_scale=gate * (1.0 - share if shared_holds_all else 1.0),
        router_std=std,
        exact=possible and not flat,
        nearly=possible and flat,
        notes=tuple(notes),
    )


def _covered(experts: int, topk: int, slices: int, notes: list[str]) -> bool:
    """Whether the experts a token is sent to hold every slice equally often."""
    if topk < slices:
        notes.append(
            f"not possible with the routed experts alone: {topk} chosen experts hold {topk} of {slices} slices"
        )
    elif topk % slices:
        notes.append(f"not possible with the routed experts alone: {topk} chosen experts are no multiple of {slices}")
    elif experts % slices:
        notes.append(f"not possible with the routed experts alone: {experts} experts are no whole groups of {slices}")
    else:
        groups = topk // slices
        notes.append(
            f"a token is sent to {groups} whole group{'s' if groups > 1 else ''} of {slices}, which hold the whole "
            "feed-forward"
            if slices > 1
            else "every expert is a copy of the whole feed-forward"
        )
        return True
    return False
