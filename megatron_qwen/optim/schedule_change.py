"""What another length or batch does to the schedule of a run that has begun. Told, never applied in silence."""

import math
from collections.abc import Iterator

from megatron_qwen.config.run import RunConfig
from megatron_qwen.optim.schedule import learning_rate

_SAME = 1e-6  # relative; rates are written with fewer digits


def schedule_changes(before: RunConfig, now: RunConfig, *, steps: int) -> Iterator[str]:
    """What differs from the run as it was begun, at the step that comes next; for people.

    Args:
        before: the configuration of the checkpoint.
        now: the configuration that goes on from it.
        steps: steps taken on the schedule.
    """
    if steps == 0:
        return
    last, old, new = _rate(before, steps), _rate(before, steps + 1), _rate(now, steps + 1)
    if not math.isclose(old, new, rel_tol=_SAME):
        end = before.optim.lr_decay_iters or before.training.train_iters
        way_back = f"To keep the old decay: optim.lr_decay_iters={end}."
        if now.optim.lr_decay_iters is not None:
            way_back = f"The decay ended at step {end} before, and ends at step {now.optim.lr_decay_iters} now."
        yield (
            f"the learning rate of step {steps + 1} is {new:.3g} over {_length(now)}. Over {_length(before)}, as the "
            f"run was begun, it would be {old:.3g}; step {steps} had {last:.3g}. {way_back}"
        )
    sequences = before.training.global_batch_size, now.training.global_batch_size
    if sequences[0] != sequences[1]:
        yield (
            f"a step has {sequences[1]:,} sequences instead of {sequences[0]:,}, and warm-up and decay are counted in "
            f"steps: the decay ends after {sequences[1] / sequences[0]:.3g} times as many sequences from here on."
        )


def _rate(config: RunConfig, step: int) -> float:
    return learning_rate(step, optim=config.optim, train_iters=config.training.train_iters)


def _length(config: RunConfig) -> str:
    return f"{config.training.train_iters:,} steps"
