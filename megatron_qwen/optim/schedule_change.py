"""What another length, batch or schedule does to a run that has begun. Told, never applied in silence."""

import itertools
import math
from collections.abc import Iterator, Mapping

from megatron_qwen.config.batch_size import global_batch_size
from megatron_qwen.config.run import RunConfig
from megatron_qwen.optim.schedule import learning_rate

_SAME = 1e-6  # relative; rates are written with fewer digits
_RATE_FIELDS = (
    "optim.learning_rate",
    "optim.min_learning_rate",
    "optim.lr_warmup_iters",
    "optim.lr_decay_style",
    "optim.lr_decay_iters",
    "optim.lr_wsd_decay_iters",
    "optim.lr_wsd_decay_style",
    "training.train_iters",
)
_STEP_FIELDS = ("training.global_batch_size", "training.rampup_batch_size", "data.seq_length")


def schedule_changes(before: RunConfig, now: RunConfig, *, steps: int, consumed: int) -> Iterator[str]:
    """What differs from the run as it was begun, from the step that comes next; for people.

    Args:
        before: the configuration of the checkpoint.
        now: the configuration that goes on from it.
        steps: steps taken on the schedule.
        consumed: samples read so far, which decide the batch of a ramp-up.
    """
    if steps == 0:
        return
    last, old, new = _rate(before, steps), _rate(before, steps + 1), _rate(now, steps + 1)
    if not math.isclose(old, new, rel_tol=_SAME):
        yield (
            f"the learning rate of step {steps + 1} is {new:.3g} with {_differing(before, now, _RATE_FIELDS)}. By the "
            f"configuration of the checkpoint it would be {old:.3g}; step {steps} had {last:.3g}."
            f"{_way_back(before, now, steps)}"
        )
    if changed := _differing(before, now, _STEP_FIELDS):
        found = [
            _milestone(name, before, now, steps=steps, consumed=consumed, ends=(ends[0], ends[1]))
            for name, ends in _milestones(before, now).items()
        ]
        if told := "; ".join(text for text in found if text):
            yield f"{changed}, and warm-up and decay are counted in steps: {told}."


def _rate(config: RunConfig, step: int) -> float:
    return learning_rate(step, optim=config.optim, train_iters=config.training.train_iters)


def _value(config: RunConfig, path: str) -> object:
    section, _, name = path.partition(".")
    value = getattr(getattr(config, section), name)
    return "null" if value is None else list(value) if isinstance(value, tuple) else value


def _differing(before: RunConfig, now: RunConfig, paths: tuple[str, ...]) -> str:
    """The fields that differ, with their values now and before."""
    values = {path: (_value(now, path), _value(before, path)) for path in paths}
    return ", ".join(f"{path}={new} (before: {old})" for path, (new, old) in values.items() if new != old)


def _decay_end(config: RunConfig) -> int:
    return config.optim.lr_decay_iters or config.training.train_iters


def _way_back(before: RunConfig, now: RunConfig, steps: int) -> str:
    """The fields of optim that bring the old schedule back at the new length; nothing where they do not."""
    wanted = {
        name: getattr(before.optim, name)
        for name in (path.partition(".")[2] for path in _RATE_FIELDS if path.startswith("optim."))
        if name != "lr_decay_iters" and getattr(before.optim, name) != getattr(now.optim, name)
    }
    if _decay_end(before) != _decay_end(now):
        wanted["lr_decay_iters"] = _decay_end(before)
    needed = {name: value for name, value in wanted.items() if not _is_back(before, now, wanted, steps, without=name)}
    if not needed or not _is_back(before, now, needed, steps):
        return ""
    fields = " ".join(f"optim.{name}={'null' if value is None else value}" for name, value in needed.items())
    return f" To keep the old schedule: {fields}."


def _is_back(before: RunConfig, now: RunConfig, changes: Mapping[str, object], steps: int, without: str = "") -> bool:
    """Whether a run with some fields of optim changed has the old rate from the next step to the end of the decay."""
    there = now.with_section("optim", **{name: value for name, value in changes.items() if name != without})
    # Between two bends each schedule is one formula, so it is the same where its ends and its middle agree.
    bends = sorted({steps + 1, *(step for step in (*_bends(before), *_bends(there)) if step > steps)})
    middles = ((first + last) // 2 for first, last in itertools.pairwise(bends))
    return all(math.isclose(_rate(before, step), _rate(there, step), rel_tol=_SAME) for step in (*bends, *middles))


def _bends(config: RunConfig) -> Iterator[int]:
    """Steps next to which a schedule changes from one formula to another."""
    end = _decay_end(config)
    length = config.optim.lr_wsd_decay_iters or max(1, end // 10)  # the default of optim/schedule.py
    for step in (config.optim.lr_warmup_iters, end - length, end):
        yield from (step, step + 1)


def _milestones(before: RunConfig, now: RunConfig) -> dict[str, tuple[int, int]]:
    """Steps at which warm-up and decay end, by the configuration before (0 without a decay) and now."""
    found = {"the warm-up ends": (before.optim.lr_warmup_iters, now.optim.lr_warmup_iters)}
    if now.optim.lr_decay_style != "constant":
        old_end = 0 if before.optim.lr_decay_style == "constant" else _decay_end(before)
        found["the decay ends"] = (old_end, _decay_end(now))
    return found


def _milestone(
    name: str, before: RunConfig, now: RunConfig, *, steps: int, consumed: int, ends: tuple[int, int]
) -> str:
    """How far ahead a milestone is, in tokens; an empty text where it is behind, or as far ahead as before."""
    if ends[1] <= steps:
        return ""
    if before.data.blend is not None or now.data.blend is not None:
        return f"{name} after another number of tokens, except over data stages with their own batch and length"
    old, new = (
        _tokens(config, steps=steps, consumed=consumed, end=end)
        for config, end in zip((before, now), ends, strict=True)
    )
    if old == new:
        return ""
    return f"{name} after {new:,} more tokens" + (f" instead of {old:,}" if old else "")


def _tokens(config: RunConfig, *, steps: int, consumed: int, end: int) -> int:
    """Tokens, padding included, of the steps after ``steps`` up to ``end``."""
    samples = 0
    for step in range(steps, end):
        batch = global_batch_size(consumed + samples, config.training)
        if batch == config.training.global_batch_size:  # the ramp-up is over
            samples += batch * (end - step)
            break
        samples += batch
    return samples * config.data.seq_length
