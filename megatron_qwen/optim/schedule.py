"""Learning rate as a function of progress."""

import math
from typing import Literal, assert_never

from megatron_qwen.config.sections import OptimConfig


def learning_rate(iteration: int, *, optim: OptimConfig, train_iters: int) -> float:
    """Learning rate of one step.

    Args:
        iteration: the step, counted from 1.
        optim: peak, floor, warm-up and decay.
        train_iters: length of the run; the decay ends there unless lr_decay_iters says otherwise.
    """
    peak, floor = optim.learning_rate, optim.min_learning_rate
    warmup, end = optim.lr_warmup_iters, optim.lr_decay_iters or train_iters
    if iteration <= warmup:
        return peak * iteration / warmup
    if optim.lr_decay_style == "constant":
        return peak
    if optim.lr_decay_style == "wsd":
        length = optim.lr_wsd_decay_iters or max(1, end // 10)
        progress = (iteration - (end - length)) / length
        shape: Literal["linear", "cosine", "minus_sqrt"] = optim.lr_wsd_decay_style
    else:
        progress = (iteration - warmup) / max(1, end - warmup)
        shape = optim.lr_decay_style
    return floor + (peak - floor) * _remaining(shape, min(max(progress, 0.0), 1.0))


def _remaining(shape: Literal["linear", "cosine", "minus_sqrt"], progress: float) -> float:
    """Remaining fraction of peak - floor, from 1 to 0, at a progress from 0 to 1."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if shape == "minus_sqrt":
        return 1 - math.sqrt(progress)
    if shape == "linear":
        return 1 - progress
    assert_never(shape)  # mypy refuses a new style of the configuration that has no formula here
