"""A run that goes on with another length or batch: what that does to the rate is told, with both curves' values."""

import math

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.optim.schedule_change import schedule_changes
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory

PEAK, FLOOR = 1e-3, 1e-4


def config(iterations: int, style: str = "cosine", *more: str):
    words = [f"training.train_iters={iterations}", f"optim.lr_decay_style={style}", "optim.lr_warmup_iters=10"]
    return resolve(
        "tiny_dense", [*words, f"optim.learning_rate={PEAK}", f"optim.min_learning_rate={FLOOR}", *more], RECIPES
    )


def told(before, now, steps: int) -> list[str]:
    return list(schedule_changes(before, now, steps=steps))


def cosine(progress: float) -> float:
    return FLOOR + (PEAK - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return FLOOR + (PEAK - FLOOR) * (1 - progress)


@pytest.mark.parametrize(
    ("style", "steps", "new", "old"),
    [
        ("cosine", 110, cosine(101 / 200), FLOOR),  # finished: the rate would jump up
        ("cosine", 60, cosine(51 / 200), cosine(51 / 100)),
        ("linear", 110, linear(101 / 200), FLOOR),
        ("linear", 60, linear(51 / 200), linear(51 / 100)),
        ("wsd", 110, PEAK, FLOOR),  # decayed: it would go back to the peak
        ("wsd", 105, PEAK, FLOOR + (PEAK - FLOOR) * (1 - 7 / 11)),  # in its decay, over the last tenth
    ],
)
def test_a_jump_is_told_with_both_values(style, steps, new, old):
    """From 110 steps, the first 10 warm-up, to 210."""
    if style == "wsd":
        shape = ("wsd", "optim.lr_wsd_decay_style=linear")
    else:
        shape = (style,)
    (text,) = told(config(110, *shape), config(210, *shape), steps)
    assert f"of step {steps + 1} is {new:.3g} over 210 steps" in text
    assert f"Over 110 steps, as the run was begun, it would be {old:.3g}" in text
    assert "To keep the old decay: optim.lr_decay_iters=110." in text


@pytest.mark.parametrize("style", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [60, 105, 110])
def test_the_field_that_is_named_keeps_the_old_decay(style, steps):
    assert told(config(110, style), config(210, style, "optim.lr_decay_iters=110"), steps) == []


@pytest.mark.parametrize(
    ("before", "now", "steps"),
    [
        (config(110), config(210), 0),  # not begun
        (config(110), config(210), 5),  # in warm-up
        (config(110, "constant"), config(210, "constant"), 110),
        (config(110, "wsd"), config(210, "wsd"), 60),  # before the decay of either
        (config(110), config(110), 60),
        (config(110, "cosine", "optim.lr_decay_iters=90"), config(210, "cosine", "optim.lr_decay_iters=90"), 110),
    ],
)
def test_nothing_is_told_where_the_rate_goes_on(before, now, steps):
    assert told(before, now, steps) == []


def test_a_shorter_run_falls_faster():
    (text,) = told(config(210), config(110), 60)
    assert f"is {cosine(51 / 100):.3g} over 110 steps" in text


def test_another_end_that_was_asked_for():
    (text,) = told(config(110), config(210, "cosine", "optim.lr_decay_iters=160"), 60)
    assert "The decay ended at step 110 before, and ends at step 160 now." in text


def test_another_batch():
    (text,) = told(config(110), config(110, "cosine", "training.global_batch_size=32"), 60)
    assert "a step has 32 sequences instead of" in text


def test_a_run_directory_takes_another_end_of_the_decay_and_no_other_schedule(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config(110))
    assert directory.foreign_problems(config(210, "cosine", "optim.lr_decay_iters=110")) == []
    (problem,) = directory.foreign_problems(config(110, "linear"))
    assert problem.where == "optim.lr_decay_style"
