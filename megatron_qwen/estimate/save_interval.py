"""How often to save: the interval that loses the least time, from the cost of a save and the time between faults.

A save costs C seconds in which training stands still, and a fault loses what was done since the last one. Faults come
at random times, M seconds of running between two of them on average, and R seconds are lost until the next step. Then
T seconds of training between two saves take (M + R) (exp((T + C) / M) - 1) seconds. Daly 2006 ("A higher order
estimate of the optimum checkpoint interval for restart dumps", equation 20) has M exp(R / M) in place of M + R: there
faults hit restarts, too. To first order the lost share is C/T + (T/2 + R)/M, least at sqrt(2 C M) (Young 1974).
Daly's equation 37 is better where saves take a good part of M.
"""

import math
from dataclasses import dataclass

# An interval of so many times the time between faults is not got through: exp(700) is near the largest double.
_NEVER = 700
# Llama 3 (arXiv 2407.21783, section 3.3.4): 466 interruptions in 54 days on 16,384 GPUs, eight a node.
DEFAULT_HOURS_BETWEEN_FAULTS_OF_A_NODE = 54 * 24 / 466 * 16_384 / 8


@dataclass(frozen=True)
class SaveInterval:
    """What an interval loses.

    Args:
        iterations: between checkpoints.
        best: the interval that loses the least.
        lost: predicted share of the time that saves, repeated steps and restarts take.
        best_lost: the same with the best interval.
        cost_s: for which training stands still for a save.
        step_s: of a step.
        fault_s: mean time between faults of the run.
    """

    iterations: int
    best: int
    lost: float
    best_lost: float
    cost_s: float
    step_s: float
    fault_s: float

    def __str__(self) -> str:
        """One line for the log."""
        basis = (
            f"a save holds training up for {self.cost_s:.2g} s, a step takes {self.step_s:.2g} s, and a fault is "
            f"expected every {self.fault_s / 3600:,.1f} h"
        )
        if self.iterations == self.best:
            return f"a checkpoint every {self.best} iterations loses the least, {self.lost:.1%} of the time: {basis}"
        return (
            f"a checkpoint every {self.iterations} iterations loses {self.lost:.1%} of the time; {self.best} would "
            f"lose the least, {self.best_lost:.1%}: {basis}"
        )


def best_interval_s(cost_s: float, fault_s: float) -> float:
    """Seconds of training between two saves that lose the least time, by Daly's higher-order formula.

    Args:
        cost_s: of a save.
        fault_s: mean time between faults.
    """
    if cost_s >= 2 * fault_s:
        return fault_s
    ratio = cost_s / (2 * fault_s)
    return math.sqrt(2 * cost_s * fault_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def lost_share(interval_s: float, *, cost_s: float, fault_s: float, restart_s: float = 0.0) -> float:
    """Share of the time that saves, repeated steps and restarts take, at most 1.

    Args:
        interval_s: training between two saves.
        cost_s: of a save.
        fault_s: mean time between faults while a run runs.
        restart_s: from a fault to the next step.
    """
    exponent = (interval_s + cost_s) / fault_s
    if exponent > _NEVER:
        return 1.0
    return 1.0 - interval_s / ((fault_s + restart_s) * math.expm1(exponent))


def seconds_between_faults(
    *, nodes: int, hours_of_a_node: float | None, observed_s: float = 0.0, observed_faults: int = 0
) -> float:
    """Mean time between faults of a run.

    What is known of the nodes counts as one fault that was seen: after a few faults of the run its own history decides.

    Args:
        nodes: of the run.
        hours_of_a_node: mean time between faults of one node; None is that of the Llama 3 runs.
        observed_s: for which the run has run so far.
        observed_faults: that ended its attempts.
    """
    expected = (hours_of_a_node or DEFAULT_HOURS_BETWEEN_FAULTS_OF_A_NODE) * 3600 / nodes
    return (expected + observed_s) / (1 + observed_faults)


def advise(
    iterations: int | None, *, cost_s: float, step_s: float, fault_s: float, restart_s: float = 0.0
) -> SaveInterval:
    """The best interval, and what it and the present one lose.

    Args:
        iterations: between checkpoints now; None takes the best.
        cost_s: of a save.
        step_s: of a step.
        fault_s: mean time between faults.
        restart_s: from a fault to the next step.
    """
    best = max(1, round(best_interval_s(cost_s, fault_s) / step_s))
    used = iterations or best

    def lost(count: int) -> float:
        return lost_share(count * step_s, cost_s=cost_s, fault_s=fault_s, restart_s=restart_s)

    return SaveInterval(used, best, lost(used), lost(best), cost_s, step_s, fault_s)
