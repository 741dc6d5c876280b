"""The interval that loses the least, against values worked out by hand."""

import math
import random

import pytest

from megatron_qwen.estimate import save_interval
from megatron_qwen.estimate.save_interval import advise, best_interval_s, lost_share, seconds_between_faults

FAULT_S = 2.8 * 3600  # Llama 3 405B on 16,384 GPUs


@pytest.mark.parametrize(("cost_s", "lost"), [(148.8, 0.1624), (6.3, 0.0349)])
def test_what_a_blocking_and_a_background_save_lose(cost_s, lost):
    """A 7B checkpoint that training waits for, and one that is written behind it: 16 % and 3.5 %."""
    young = math.sqrt(2 * cost_s * FAULT_S)
    assert lost_share(young, cost_s=cost_s, fault_s=FAULT_S) == pytest.approx(lost, rel=2e-3)
    # To first order half of it are saves and half repeated steps.
    assert cost_s / young == pytest.approx(young / 2 / FAULT_S)


def test_daly():
    """sqrt(2 x 50 x 10,000) = 1000, C / 2M = 1/400: 1000 x (1 + 1/60 + 1/3600) - 50."""
    assert best_interval_s(50, 10_000) == pytest.approx(1000 * (1 + 1 / 60 + 1 / 3600) - 50)
    assert best_interval_s(200, 100) == best_interval_s(500, 100) == 100  # saves as long as the time between faults
    assert best_interval_s(199.999, 100) == pytest.approx(200 * (1 + 1 / 3 + 1 / 9) - 200, rel=1e-3)


def test_daly_loses_no_more_than_neighbours():
    """By the exact time of a run with exponential faults: M (exp((T + C) / M) - 1) for T seconds of steps."""

    def wall(interval_s: float) -> float:
        return FAULT_S * math.expm1((interval_s + 148.8) / FAULT_S) / interval_s

    best = best_interval_s(148.8, FAULT_S)
    assert wall(best) < min(wall(best * 0.95), wall(best * 1.05))


def test_a_restart_is_lost_at_every_fault():
    """1 - 100 / (1050 (exp(0.101) - 1)); to first order 0.01 + 0.05 + 0.05."""
    assert lost_share(100, cost_s=1, fault_s=1000, restart_s=50) == pytest.approx(0.103866, abs=1e-6)
    assert lost_share(1e6, cost_s=1, fault_s=1000) == 1.0
    assert lost_share(1e9, cost_s=1, fault_s=1000) == 1.0


def test_a_run_with_drawn_faults():
    """Hours of running until a fault drawn at random, restarts in between: the share that was not lost."""
    draw, whole, kept, interval_s = random.Random(3), 0.0, 0, 400.0
    while kept < 20_000:
        fault = draw.expovariate(1 / FAULT_S)
        saved = int(fault // (interval_s + 60))
        kept += saved
        whole += fault + 900
    lost = lost_share(interval_s, cost_s=60, fault_s=FAULT_S, restart_s=900)
    assert 1 - kept * interval_s / whole == pytest.approx(lost, abs=0.01)


def test_time_between_faults():
    """54 days x 24 h / 466 x 2,048 nodes; a node of 100 h in a run of ten: 10 h, and then what the run has seen."""
    assert pytest.approx(5695.7, abs=0.1) == save_interval.DEFAULT_HOURS_BETWEEN_FAULTS_OF_A_NODE
    assert seconds_between_faults(nodes=2048, hours_of_a_node=None) == pytest.approx(2.781 * 3600, rel=1e-3)
    assert seconds_between_faults(nodes=10, hours_of_a_node=100) == 36_000
    seen = seconds_between_faults(nodes=10, hours_of_a_node=100, observed_s=20 * 3600, observed_faults=4)
    assert seen == pytest.approx(6 * 3600)


def test_advice():
    """Cost 50 s, a fault every 10,000 s, steps of 2 s: Daly's 966.9 s are 483 steps."""
    found = advise(100, cost_s=50, step_s=2, fault_s=10_000)
    assert (found.iterations, found.best) == (100, 483)
    assert found.lost == pytest.approx(1 - 200 / (10_000 * math.expm1(250 / 10_000)))
    assert found.best_lost == pytest.approx(1 - 966 / (10_000 * math.expm1(1016 / 10_000)))
    assert "a checkpoint every 100 iterations loses 21.0% of the time; 483 would lose the least, 9.7%" in str(found)
    chosen = advise(None, cost_s=50, step_s=2, fault_s=10_000)
    assert (chosen.iterations, chosen.lost) == (483, found.best_lost)
    assert "a checkpoint every 483 iterations loses the least, 9.7% of the time" in str(chosen)
    assert advise(None, cost_s=0.001, step_s=500, fault_s=10_000).best == 1
