"""What the losses of a run's steps say: its final loss, and whether it diverged."""

from collections.abc import Sequence

import numpy as np

from tools.scaling.observations import Array

# The final loss is the mean over this share of the steps, where no validation was measured at the end.
TAIL = 0.05
# But at least over so many: a single step is noise.
_LEAST_STEPS = 5
# A run diverged where that mean lies so much above the lowest mean of as many steps before it.
RISE = 0.1


def tail_means(losses: Sequence[float]) -> Array:
    """Means over as many steps as make up the final loss, at every step from there on, in nats a token.

    Args:
        losses: of the steps in their order; NaN where a step has none.

    Returns:
        [steps - window + 1]; the last one is the final loss, NaN where no step of its window has a loss.
    """
    values = np.array(losses, dtype=float)
    width = max(min(_LEAST_STEPS, len(values)), round(TAIL * len(values)))
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    counted = np.isfinite(windows).sum(axis=1)  # a step that was skipped has no loss; one of many is no divergence
    sums = np.nansum(np.where(np.isfinite(windows), windows, 0.0), axis=1)
    means: Array = np.where(counted > 0, sums, np.nan) / counted.clip(1)
    return means


def went_astray(means: Array) -> str | None:
    """Why a run with these ``tail_means`` diverged; None where it did not."""
    if not np.isfinite(means[-1]):
        return "its loss was not finite"
    lowest = float(np.nanmin(means))
    return f"its loss came to {means[-1]:.3f}, having been {lowest:.3f}" if means[-1] > lowest * (1 + RISE) else None
