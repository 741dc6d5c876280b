"""Runs two models on the same prompts, layer by layer, and says how far their logits are apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.compare.divergence import PredictionSums, labels_of, position_blocks
from checkpoints_convert.layerwise.layered import LayeredModel
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import ConversionError, Problem

PROMPTS = (
    "The committee met on 17 March 2021 and agreed, after 3 hours, that the bridge should be closed for repairs.",
    "def merge(left, right):\n    result = []\n    while left or right:\n        result += [min(left, right)[0]]\n",
    "长江是中国最长的河流，全长约6300公里，流经11个省级行政区。",  # noqa: RUF001
    "SELECT name, COUNT(*) FROM orders WHERE total > 99.95 GROUP BY name; -- naïve façade 😀\t\n",
)
# Largest difference of a logit, in units of their root mean square where that is above 1, and least cosine of all
# logits together. fp32: rounding of sums in another order. bf16: 8 bits of mantissa, rounded after every operation of
# every layer in two different orders; a router may then send a token elsewhere, which moves its logits by about their
# own size, so the largest difference says little there and the cosine decides.
TOLERANCE = {"fp32": (1e-4, 0.999_999), "bf16": (1.0, 0.998)}
_RANDOM_LENGTH, _RANDOM_PROMPTS = 64, 4
_BLOCK_VALUES = 1 << 23  # of the output matrix at a time: 32 MiB in fp32


@dataclass(frozen=True)
class LogitComparison:
    """Two models on the same tokens.

    Args:
        dtype: format both computed in.
        positions: tokens compared.
        max_abs_difference: of a logit.
        rms: root mean square of the first model's logits.
        tolerance: largest difference that passes, ``TOLERANCE`` times the root mean square where that is above 1.
        cosine: of all logits together.
        cosine_tolerance: least cosine that passes.
        least_cosine: smallest cosine at a position.
        top1_agreement: share of positions with the same argmax token.
        kl_mean: Kullback-Leibler divergence from the first model's predictions to the second's, nats a position.
        kl_worst: at the position where it is largest.
        kl_tolerance: largest mean that passes, where a side is quantized; it decides there, not the differences. None
            where no side is.
        perplexity: of the first model on the tokens of the prompts, each after the ones before; NaN where there are
            none that follow.
        other_perplexity: of the second.
        layer_differences: relative difference of the residual stream after every layer.
    """

    dtype: str
    positions: int
    max_abs_difference: float
    rms: float
    tolerance: float
    cosine: float
    cosine_tolerance: float
    least_cosine: float
    top1_agreement: float
    kl_mean: float
    kl_worst: float
    kl_tolerance: float | None
    perplexity: float
    other_perplexity: float
    layer_differences: list[float]

    @property
    def passes(self) -> bool:
        """Whether the models agree; NaN does not pass."""
        if self.kl_tolerance is not None:
            return self.kl_mean <= self.kl_tolerance
        return self.max_abs_difference <= self.tolerance and self.cosine >= self.cosine_tolerance

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        found = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return {**found, "passes": self.passes}

    def __str__(self) -> str:
        judged = self.kl_tolerance is None
        limits = (f"tolerance {self.tolerance:.2e}, ", f"tolerance {self.cosine_tolerance}; ") if judged else ("", "")
        kl_limit = "" if judged else f"tolerance {self.kl_tolerance:g}; "
        return (
            f"logits in {self.dtype} over {self.positions} positions: largest difference "
            f"{self.max_abs_difference:.2e} ({limits[0]}rms {self.rms:.2f})\n"
            f"cosine {self.cosine:.7f} ({limits[1]}{self.least_cosine:.7f} at the worst "
            f"position), same argmax token at {self.top1_agreement:.2%}\n"
            f"KL divergence {self.kl_mean:.2e} nats ({kl_limit}{self.kl_worst:.2e} at the worst position), perplexity "
            f"{self.perplexity:.4f} and {self.other_perplexity:.4f}"
        )


def prompt_tokens(prompts: Sequence[str], tokenizer: Path | None, *, vocab_size: int) -> list[torch.Tensor]:
    """Token ids, [s] each: of the prompts, or drawn at random where there is no tokenizer.

    Raises:
        ConversionError: prompts are given and there is no tokenizer, or it has more ids than the model.
    """
    if tokenizer is None:
        if prompts:
            raise ConversionError(Problem("--prompt", prompts[0], "requires a tokenizer; neither side has one."))
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocab_size, (_RANDOM_LENGTH,), generator=generator) for _ in range(_RANDOM_PROMPTS)]
    found = load_tokenizer(tokenizer).encode_batch(list(prompts or PROMPTS))
    if any(token >= vocab_size for ids in found for token in ids):
        raise ConversionError(Problem(str(tokenizer), None, f"has ids beyond the {vocab_size} of the model."))
    if not any(found):
        raise ConversionError(Problem("--prompt", "", "has no tokens; give a text."))
    return [torch.tensor(ids) for ids in found if ids]


@torch.no_grad()
def compare(
    first: LayeredModel,
    second: LayeredModel,
    prompts: Sequence[torch.Tensor],
    *,
    dtype: str,
    kl_tolerance: float | None = None,
    on_layer: Callable[[int], None] = lambda index: None,
) -> LogitComparison:
    """Runs both models; one layer of each is in memory at a time, and of the logits a block (about 200 MiB).

    Args:
        first: the reference.
        second: of the same number of layers and the same vocabulary.
        prompts: token ids, [s] each.
        dtype: name of the format both compute in, for the tolerance.
        kl_tolerance: mean divergence that passes, where a side is quantized.
        on_layer: told of every layer that is done.
    """
    streams = [[model.embed(tokens) for tokens in prompts] for model in (first, second)]
    differences = []
    for index in range(first.num_layers):
        for side, model in enumerate((first, second)):
            model.load_layer(index)
            streams[side] = [model.layer(hidden) for hidden in streams[side]]
        ours, theirs = (torch.cat(side).float() for side in streams)
        differences.append(float((ours - theirs).norm() / ours.norm().clamp(min=1e-30)))
        on_layer(index)
    hidden = [
        torch.cat([model.final_norm(item) for item in side])
        for model, side in zip((first, second), streams, strict=True)
    ]
    labels = labels_of(list(prompts))
    found = _compare_outputs(first, second, hidden, labels, dtype=dtype, layer_differences=differences)
    return replace(found, kl_tolerance=kl_tolerance)


def _compare_outputs(
    first: LayeredModel,
    second: LayeredModel,
    hidden: list[torch.Tensor],
    labels: torch.Tensor,
    *,
    dtype: str,
    layer_differences: list[float],
) -> LogitComparison:
    """Logits over the vocabulary block by block; hidden [positions, h] each, labels [positions]."""
    positions, width = hidden[0].shape
    worst = 0.0
    dot, squares = torch.zeros(positions), torch.zeros(2, positions)
    sums = PredictionSums(labels)
    step = max(1, _BLOCK_VALUES // width)
    for start in range(0, first.vocab_size, step):
        stop = min(first.vocab_size, start + step)
        rows = [model.output_rows(start, stop).t() for model in (first, second)]
        for part in position_blocks(positions, stop - start):
            ours, theirs = ((hidden[side][part] @ rows[side]).float().cpu() for side in range(2))
            worst = max(worst, float((ours - theirs).abs().max().nan_to_num(nan=torch.inf)))
            dot[part] += (ours * theirs).sum(1)
            squares[0, part] += ours.square().sum(1)
            squares[1, part] += theirs.square().sum(1)
            sums.add(part, start, ours, theirs)
    rms = float((squares[0].sum() / (positions * first.vocab_size)).sqrt())
    cosine = dot / (squares[0] * squares[1]).sqrt().clamp(min=1e-30)
    limit, least = TOLERANCE[dtype]
    divergence = sums.divergence()
    return LogitComparison(
        dtype=dtype,
        positions=positions,
        max_abs_difference=worst,
        rms=rms,
        tolerance=limit * max(1.0, rms),
        cosine=float(dot.double().sum() / (squares[0].double().sum() * squares[1].double().sum()).sqrt()),
        cosine_tolerance=least,
        least_cosine=float(cosine.min()),
        top1_agreement=sums.top1_agreement(),
        kl_mean=divergence.mean,
        kl_worst=divergence.worst,
        kl_tolerance=None,
        perplexity=divergence.perplexity,
        other_perplexity=divergence.other_perplexity,
        layer_differences=layer_differences,
    )
