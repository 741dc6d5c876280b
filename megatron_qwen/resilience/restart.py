"""Whether ranks are started again inside the allocation of their job, or the job goes back to the queue."""

from dataclasses import dataclass

from megatron_qwen.resilience.policy import AttemptOutcome, Decision
from megatron_qwen.resilience.rules import RULES, Action, Reason

# What a start takes on a large job: imports, rendezvous, loading, compilation. With less time left a restart would
# reach the time limit before it has saved anything, and a requeue begins with a whole time limit. Chosen by hand.
_START_S = 300.0


@dataclass(frozen=True, kw_only=True)
class JobSituation:
    """What a controller knows of its job when an attempt has ended.

    Args:
        enabled: ``resilience.restart_in_job``.
        stopping: whether the job has been told to stop.
        seconds_left: until the time limit; None without one.
        signal_delay_s: how long before the limit the job is told to stop.
        barren_before: whether the attempt before this one was barren, see ``is_barren``.
    """

    enabled: bool
    stopping: bool
    seconds_left: float | None
    signal_delay_s: float
    barren_before: bool = False


def is_barren(reason: str | None, gained: int | None) -> bool:
    """Whether ranks were started, failed and had finished no iteration: what broke them may not have passed yet."""
    failed = reason in set(Reason) and RULES[Reason(reason)].in_job and reason != Reason.UNHEALTHY_NODE
    return failed and not gained


def why_requeue(outcome: AttemptOutcome, decision: Decision, situation: JobSituation) -> str | None:
    """Why the next attempt has to wait in the queue; None if the nodes of the job decide that.

    Args:
        outcome: of the attempt.
        decision: a requeue, by the table.
        situation: of the job.
    """
    rule, left = RULES[outcome.reason], situation.seconds_left
    assert decision.action is Action.REQUEUE
    if not situation.enabled:
        return "resilience.restart_in_job is false"
    if situation.stopping:
        return "the job has been told to stop"
    if not rule.in_job:
        return f"the reason is: {outcome.reason}"
    if outcome.reason is Reason.ERROR and outcome.iteration is None:
        return "an attempt that fails before its first step may need other nodes"
    # An unhealthy node is replaced here, so nothing has to pass before the next attempt.
    if decision.delay_s and outcome.reason is not Reason.UNHEALTHY_NODE:
        return "the next attempt has to wait"
    if situation.barren_before and is_barren(outcome.reason, outcome.gained):
        # During an outage every restart fails within a minute: the queue gives it time to pass.
        return "two attempts in a row have finished no iteration"
    if left is not None and left < (needed := situation.signal_delay_s + _START_S):
        return f"{max(left, 0):.0f} s are left before the time limit, {needed:.0f} are needed"
    return None
