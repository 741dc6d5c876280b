"""Runs two models on the same prompts, layer by layer, and says how far their logits are apart."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.compare.layered import LayeredModel
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
    layer_differences: list[float]

    @property
    def passes(self) -> bool:
        """Whether the models agree."""
        return self.max_abs_difference <= self.tolerance and self.cosine >= self.cosine_tolerance

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "passes": self.passes}

    def __str__(self) -> str:
        return (
            f"logits in {self.dtype} over {self.positions} positions: largest difference "
            f"{self.max_abs_difference:.2e} (tolerance {self.tolerance:.2e}, rms {self.rms:.2f})\n"
            f"cosine {self.cosine:.7f} (tolerance {self.cosine_tolerance}; {self.least_cosine:.7f} at the worst "
            f"position), same argmax token at {self.top1_agreement:.2%}"
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
    on_layer: Callable[[int], None] = lambda index: None,
) -> LogitComparison:
    """Runs both models; one layer of each is in memory at a time.

    Args:
        first: the reference.
        second: of the same number of layers and the same vocabulary.
        prompts: token ids, [s] each.
        dtype: name of the format both compute in, for the tolerance.
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
    return _compare_outputs(first, second, hidden, dtype=dtype, layer_differences=differences)


def _compare_outputs(
    first: LayeredModel, second: LayeredModel, hidden: list[torch.Tensor], *, dtype: str, layer_differences: list[float]
) -> LogitComparison:
    """Logits over the vocabulary block by block; [positions, h] each."""
    positions, width = hidden[0].shape
    worst = 0.0
    dot, squares = torch.zeros(positions), [torch.zeros(positions), torch.zeros(positions)]
    best = [torch.full((positions,), -torch.inf) for _ in range(2)]
    token = [torch.zeros(positions, dtype=torch.long) for _ in range(2)]
    step = max(1, _BLOCK_VALUES // width)
    for start in range(0, first.vocab_size, step):
        stop = min(first.vocab_size, start + step)
        logits = [
            (states @ model.output_rows(start, stop).t()).float().cpu()
            for model, states in zip((first, second), hidden, strict=True)
        ]
        worst = max(worst, float((logits[0] - logits[1]).abs().max().nan_to_num(nan=torch.inf)))
        dot += (logits[0] * logits[1]).sum(1)
        for side in range(2):
            squares[side] += logits[side].square().sum(1)
            value, place = logits[side].max(1)
            higher = value > best[side]
            best[side] = torch.where(higher, value, best[side])
            token[side] = torch.where(higher, place + start, token[side])
    rms = float((squares[0].sum() / (positions * first.vocab_size)).sqrt())
    cosine = dot / (squares[0] * squares[1]).sqrt().clamp(min=1e-30)
    limit, least = TOLERANCE[dtype]
    return LogitComparison(
        dtype=dtype,
        positions=positions,
        max_abs_difference=worst,
        rms=rms,
        tolerance=limit * max(1.0, rms),
        cosine=float(dot.double().sum() / (squares[0].double().sum() * squares[1].double().sum()).sqrt()),
        cosine_tolerance=least,
        least_cosine=float(cosine.min()),
        top1_agreement=float((token[0] == token[1]).float().mean()),
        layer_differences=layer_differences,
    )
