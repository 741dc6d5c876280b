"""Shapes of a family for a wanted number of parameters: width, depth and feed-forward near the family's own ratios."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.estimate.parameters import count_parameters

# Width over depth and feed-forward over width of Qwen2.5 by parameters without embeddings (released configurations).
# Below the smallest its width over depth falls as it does from 1.5B to 0.5B, and no further than to 16.
_DENSE = (
    (0.358e9, 37.3, 5.43),
    (1.31e9, 54.9, 5.83),
    (2.77e9, 56.9, 5.375),
    (6.53e9, 128.0, 5.29),
    (13.2e9, 106.7, 2.7),
    (31.2e9, 80.0, 5.4),
    (70.2e9, 102.4, 3.61),
)
_LEAST_ASPECT = 16.0
# How much a shape may miss the wanted number before its ratios matter less than the number.
_MISS, _ASPECT = 1.0, 0.03
_DEEPEST, _WIDEST = 128, 16384


@dataclass(frozen=True)
class ModelShape:
    """One rung.

    Args:
        model: the shape.
        params: parameters that a token meets, without embeddings.
        total: all parameters without embeddings.
        embedding: of the input embedding and the output matrix.
    """

    model: ModelConfig
    params: int
    total: int
    embedding: int

    @property
    def granularity(self) -> float | None:
        """Size of a dense feed-forward of the same width over an expert; None for a dense model."""
        model = self.model
        return model.ffn_hidden_size / (model.moe_ffn_hidden_size or 1) if model.is_moe else None

    @property
    def name(self) -> str:
        """Such as ``l4_h128_f512``, or ``l4_h128_e8x64`` for eight experts of 64."""
        model = self.model
        width = f"e{model.num_moe_experts}x{model.moe_ffn_hidden_size}" if model.is_moe else f"f{model.ffn_hidden_size}"
        return f"l{model.num_layers}_h{model.hidden_size}_{width}"


def shape_of(model: ModelConfig) -> ModelShape:
    """Counts of a model."""
    count = count_parameters(model)
    embedding = count.embedding + count.output
    return ModelShape(model, count.active - embedding, count.without_embeddings, embedding)


def shape_near(config: RunConfig, params: float) -> ModelShape:
    """The family's shape with about so many parameters without embeddings (active ones of an MoE model).

    Everything that is no size (vocabulary, ties, experts and how many a token visits, biases) is the configuration's;
    experts keep their share of the feed-forward.

    Args:
        config: a recipe of the family.
        params: wanted.
    """
    aspect, ratio = _ratios(params)
    base = config.model
    if base.is_moe:
        ratio = base.ffn_hidden_size / base.hidden_size
    best, least = None, math.inf
    for layers in range(2, _DEEPEST + 1):
        for hidden in _widths(layers, aspect):
            shape = shape_of(_sized(base, layers, hidden, ratio))
            miss = abs(math.log(shape.params / params)) * _MISS + abs(math.log(hidden / layers / aspect)) * _ASPECT
            if miss < least:
                best, least = shape, miss
    assert best is not None
    return best


def _widths(layers: int, aspect: float) -> list[int]:
    """Widths within a factor of 1.6 of the ratio, in steps that heads divide."""
    low, high = layers * aspect / 1.6, min(layers * aspect * 1.6, _WIDEST)
    unit = _unit(high)
    return list(range(max(unit, math.ceil(low / unit) * unit), int(high) + 1, unit))


def _unit(hidden: float) -> int:
    if hidden < 512:
        return 16
    return 64 if hidden < 2048 else 512  # heads in fours, for tensor parallelism


def _ratios(params: float) -> tuple[float, float]:
    """Width over depth, and feed-forward over width, for a size: between the family's neighbours, geometrically."""
    logs = [math.log(size) for size, _, _ in _DENSE]
    x = math.log(params)
    if x <= logs[0]:
        slope = math.log(_DENSE[1][1] / _DENSE[0][1]) / (logs[1] - logs[0])
        return max(_LEAST_ASPECT, _DENSE[0][1] * math.exp(slope * (x - logs[0]))), _DENSE[0][2]
    for (low, a, f), (high, b, g) in pairwise(_DENSE):
        if x <= math.log(high):
            part = (x - math.log(low)) / (math.log(high) - math.log(low))
            return a ** (1 - part) * b**part, f ** (1 - part) * g**part
    return _DENSE[-1][1], _DENSE[-1][2]


def _sized(base: ModelConfig, layers: int, hidden: int, ratio: float) -> ModelConfig:
    unit = _unit(hidden)
    head = 128 if hidden >= 1536 else 64 if hidden >= 256 else 16
    heads = max(1, hidden // head)
    groups = _groups(heads, base.num_attention_heads // base.num_query_groups)
    ffn = max(unit, round(ratio * hidden / unit) * unit)
    changes: dict[str, object] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head,
    }
    if base.is_moe:
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
            size = getattr(base, name)
            if size is not None:
                changes[name] = max(8, round(size / base.ffn_hidden_size * ffn / 8) * 8)
    return replace(base, **changes)  # type: ignore[arg-type]


def _groups(heads: int, wanted: int) -> int:
    """Key/value heads: a power of two, so that they can be shared out, nearest to the family's query heads for each."""
    powers = [1 << power for power in range(heads.bit_length()) if heads % (1 << power) == 0]
    return min(powers, key=lambda size: (abs(math.log(heads / size / wanted)), size))
