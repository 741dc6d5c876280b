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


def told(before, now, steps: int, consumed: int | None = None) -> list[str]:
    """Of a run that has read 8 samples a step."""
    return list(schedule_changes(before, now, steps=steps, consumed=8 * steps if consumed is None else consumed))


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
    assert f"of step {steps + 1} is {new:.3g} with training.train_iters=210 (before: 110)." in text
    assert f"By the configuration of the checkpoint it would be {old:.3g}; step {steps} had" in text
    assert "To keep the old schedule: optim.lr_decay_iters=110." in text


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
    assert f"is {cosine(51 / 100):.3g} with training.train_iters=110 (before: 210)" in text


@pytest.mark.parametrize(
    ("style", "before", "now", "steps", "back"),
    [
        ("cosine", [], ["training.train_iters=210", "optim.lr_decay_iters=160"], 60, ["optim.lr_decay_iters=110"]),
        ("wsd", [], ["optim.lr_wsd_decay_iters=60"], 60, ["optim.lr_wsd_decay_iters=null"]),
        ("wsd", ["optim.lr_wsd_decay_iters=20"], [], 95, ["optim.lr_wsd_decay_iters=20"]),
        (
            "wsd",
            [],
            ["training.train_iters=130", "optim.lr_wsd_decay_iters=60"],
            104,
            ["optim.lr_wsd_decay_iters=null", "optim.lr_decay_iters=110"],
        ),
        ("cosine", [], ["optim.learning_rate=5e-4"], 60, ["optim.learning_rate=0.001"]),
        ("cosine", [], ["optim.min_learning_rate=0"], 60, ["optim.min_learning_rate=0.0001"]),
        ("constant", [], ["optim.learning_rate=5e-4", "training.train_iters=500"], 60, ["optim.learning_rate=0.001"]),
        ("cosine", [], ["optim.lr_warmup_iters=40"], 20, ["optim.lr_warmup_iters=10"]),
        (
            "constant",
            [],
            ["optim.lr_decay_style=wsd", "optim.lr_wsd_decay_iters=50"],
            60,
            ["optim.lr_decay_style=constant"],
        ),
        (  # a decay that is short beside the run
            "wsd",
            ["optim.lr_decay_iters=1000000", "optim.lr_wsd_decay_iters=1000"],
            ["optim.learning_rate=5e-4", "optim.lr_wsd_decay_iters=700"],
            60,
            ["optim.learning_rate=0.001", "optim.lr_wsd_decay_iters=1000"],
        ),
        ("wsd", [], ["optim.lr_wsd_decay_style=linear"], 105, ["optim.lr_wsd_decay_style=minus_sqrt"]),
    ],
)
def test_fields_that_differ_are_named_and_the_way_back_leads_back(style, before, now, steps, back):
    kept = before if now else []  # otherwise a field of the checkpoint that is no longer given
    begun, changed = config(110, style, *before), config(110, style, *kept, *now)
    (text,) = told(begun, changed, steps)
    for word in now:
        assert f"{word.partition('=')[0]}=" in text.partition(" By the configuration")[0]
    assert text.endswith(f" To keep the old schedule: {' '.join(back)}.")
    # What is named is set beside what was changed, as a person would type it.
    assert told(begun, config(110, style, *kept, *now, *back), steps) == []


def batch(*words: str, iterations: int = 110, style: str = "cosine"):
    return config(iterations, style, "data.seq_length=64", "training.global_batch_size=8", *words)


@pytest.mark.parametrize(
    ("before", "now", "steps", "text"),
    [
        (
            batch(),
            batch("training.global_batch_size=32"),
            60,
            "training.global_batch_size=32 (before: 8), and warm-up and decay are counted in steps: "
            "the decay ends after 102,400 more tokens instead of 25,600.",  # 50 steps of 32, or of 8, times 64
        ),
        (
            batch(),
            batch("training.global_batch_size=32"),
            5,
            "training.global_batch_size=32 (before: 8), and warm-up and decay are counted in steps: "
            "the warm-up ends after 10,240 more tokens instead of 2,560; "
            "the decay ends after 215,040 more tokens instead of 53,760.",
        ),
        (
            batch(),
            batch("data.seq_length=128"),
            60,
            "data.seq_length=128 (before: 64), and warm-up and decay are counted in steps: "
            "the decay ends after 51,200 more tokens instead of 25,600.",
        ),
        (
            batch(),
            batch("training.global_batch_size=32", "data.blend=stages.yaml"),
            60,
            "training.global_batch_size=32 (before: 8), and warm-up and decay are counted in steps: the decay ends "
            "after another number of tokens, except over data stages with their own batch and length.",
        ),
    ],
)
def test_another_step_is_told_with_the_tokens_to_the_end_of_the_decay(before, now, steps, text):
    assert told(before, now, steps) == [text]


def test_a_ramp_up_is_counted_step_by_step():
    """From sample 20: 4 steps of 4 samples (the first level of three ends after 100 / 3), 6 of 6, and 90 of 8."""
    (text,) = told(batch(), batch("training.rampup_batch_size=[4,2,100]"), 10, consumed=20)
    assert text.startswith("training.rampup_batch_size=[4, 2, 100] (before: null), and warm-up and decay are counted")
    assert text.endswith(f"the decay ends after {(4 * 4 + 6 * 6 + 90 * 8) * 64:,} more tokens instead of 51,200.")
    assert told(batch(), batch("training.rampup_batch_size=[4,2,100]"), 60, consumed=480) == [], "it is over"


@pytest.mark.parametrize(
    ("before", "now", "steps"),
    [
        (batch(style="constant"), batch("training.global_batch_size=32", style="constant"), 60),
        (batch(), batch("training.global_batch_size=32"), 110),
        (batch("optim.lr_decay_iters=50"), batch("training.global_batch_size=32", "optim.lr_decay_iters=50"), 60),
    ],
)
def test_nothing_is_told_of_a_step_where_no_decay_lies_ahead(before, now, steps):
    assert told(before, now, steps) == []


def test_another_batch_and_another_length():
    rate, step = told(batch(), batch("training.global_batch_size=32", iterations=85), 60)
    assert f"is {cosine(51 / 75):.3g} with training.train_iters=85 (before: 110)" in rate
    assert step.endswith("the decay ends after 51,200 more tokens instead of 25,600.")
    # Twice the batch over half of the steps that were left: the decay ends at the same token.
    (rate,) = told(batch(), batch("training.global_batch_size=16", iterations=85), 60)
    assert "the learning rate of step 61" in rate


def test_a_run_directory_takes_another_end_of_the_decay_and_no_other_schedule(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config(110))
    assert directory.foreign_problems(config(210, "cosine", "optim.lr_decay_iters=110")) == []
    (problem,) = directory.foreign_problems(config(110, "linear"))
    assert problem.where == "optim.lr_decay_style"
