"""A learnt timeout ends a hung run early, and never a slow one."""

import random

import pytest

from megatron_qwen.resilience.phase_timeouts import PhaseTimeouts, PhaseTimes

LEARNS = PhaseTimeouts()


def times(phase: str, longest_s: float, count: int, **others: float) -> PhaseTimes:
    return PhaseTimes({phase: longest_s, **others}, {phase: count})


@pytest.mark.parametrize(
    ("phase", "longest_s", "count", "timeout_s"),
    [
        ("training", 1.0, 19, 900),  # not seen often enough
        ("training", 1.0, 20, 600),
        ("training", 35.0, 20, 700),
        ("training", 100.0, 20, 900),
        ("training", 700.0, 20, 2100),
        ("saving", 10.0, 1, 1800),
        ("saving", 10.0, 2, 900),
        ("saving", 301.0, 2, 903),
        ("saving", 700.0, 2, 2100),
        ("validating", 1.0, 2, 900),
        ("finishing", 1.0, 0, 1800),
        ("starting", 60.0, 0, 1800),
        ("starting", 601.0, 0, 1803),
        ("starting", 1000.0, 0, 3000),
    ],
)
def test_what_is_learnt(phase, longest_s, count, timeout_s):
    assert LEARNS.of(phase, times(phase, longest_s, count)) == timeout_s


def test_what_holds_before_anything_is_known():
    nothing = PhaseTimes()
    assert [LEARNS.of(phase, nothing) for phase in ("starting", "training", "saving")] == [1800, 900, 1800]
    assert LEARNS.of("training", PhaseTimes({"starting": 1500.0})) == 4500, "the set-up had a step in it"


def test_a_number_of_the_user_is_the_timeout():
    fixed = PhaseTimeouts(start_s=50, step_s=6)
    known = PhaseTimes({"training": 100.0, "saving": 900.0, "starting": 1.0}, {"training": 99, "saving": 99})
    assert [fixed.of(phase, known) for phase in ("starting", "training", "saving", "finishing")] == [50, 6, 6, 6]
    assert PhaseTimeouts(step_s=6).of("starting", PhaseTimes()) == 1800


def test_a_slow_run_is_not_ended():
    """Steps of any length up to a quarter of an hour, each up to three times as long as the longest before it."""
    chance = random.Random(0)
    for _ in range(500):
        usual = chance.uniform(0.01, 900.0)
        known = PhaseTimes().with_one("starting", chance.uniform(usual, 3 * usual))
        for _ in range(60):
            longest = known.longest_s.get("training", usual)
            lasts = min(chance.uniform(0.5 * usual, 3 * longest), max(3 * longest, 900.0))
            assert lasts <= LEARNS.of("training", known)
            known = known.with_one("training", lasts)
