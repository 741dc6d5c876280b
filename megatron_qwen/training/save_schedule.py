"""When a run saves: at a fixed interval, or at the one that loses the least by what the run has measured."""

import json
import logging
import math
import statistics
from collections import deque
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.checkpoint import CheckpointConfig
from megatron_qwen.estimate.save_interval import SaveInterval, advise, seconds_between_faults
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.rundir import RunDirectory

log = logging.getLogger(__name__)
_FAULTS = (Reason.LOST_NODE, Reason.LOST_PEER, Reason.HANG, Reason.UNHEALTHY_NODE, Reason.CORRUPTION)
# Steps of an attempt after which its pace is known, and how long until the first save, which measures the cost of one.
# Chosen by hand.
_WARM_UP_STEPS, _FIRST_SAVE_S = 5, 600.0
_REMEMBERED_STEPS, _REMEMBERED_SAVES = 100, 10
# A chosen interval is announced again when it has changed by a fifth.
_WORTH_TELLING = 1.2


class SaveSchedule:
    """Decides after every step whether to save. Every method is called by all ranks together.

    Args:
        settings: of the run.
        resumed_at: iteration that training resumes from.
        saved_at: iteration of the newest checkpoint, before ``resumed_at`` where a local one is resumed from; None is
            ``resumed_at``.
        fault_s: mean time between faults of the run; rank 0's counts.
        restart_s: from the start of the process to the first step.
        earlier_cost_s: of a save, as an earlier attempt measured it.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        *,
        resumed_at: int,
        saved_at: int | None = None,
        fault_s: float,
        restart_s: float = 0.0,
        earlier_cost_s: float | None = None,
    ) -> None:
        self._settings, self._fault_s, self._restart_s = settings, fault_s, restart_s
        self._costs: deque[float] = deque([] if earlier_cost_s is None else [earlier_cost_s], _REMEMBERED_SAVES)
        self._steps: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._begun_at, self._saved_at = resumed_at, resumed_at if saved_at is None else saved_at
        # A save that was due is made up for: the next may be far away.
        self._overdue = any(map(self._is_fixed, range(self._saved_at + 1, resumed_at + 1)))
        self._chosen: int | None = None
        self._told = 0
        self.advice: SaveInterval | None = None

    def is_due(self, iteration: int, step_s: float) -> bool:
        """Whether to save after this step.

        Args:
            iteration: its number.
            step_s: that it took.
        """
        self._steps.append(step_s)
        if self._settings.save_interval is None and iteration == self._begun_at + _WARM_UP_STEPS:
            self._choose()
        if self._overdue or self._is_fixed(iteration):
            return True
        return self._chosen is not None and iteration >= self._saved_at + self._chosen

    def _is_fixed(self, iteration: int) -> bool:
        """Whether the configuration alone says that this iteration is saved."""
        settings, interval = self._settings, self._settings.save_interval
        every = settings.keep_every if interval is None else interval
        return iteration in settings.save_at or bool(every and iteration % every == 0)

    def begun(self, iteration: int) -> None:
        """Takes note of a save that begins: the next one is counted from it, however late it is committed."""
        self._saved_at, self._overdue = max(self._saved_at, iteration), False

    def saved(self, iteration: int, cost_s: float) -> None:
        """Takes note of a committed checkpoint.

        Args:
            iteration: of the checkpoint.
            cost_s: for which training stood still for it.
        """
        self.begun(iteration)
        self._costs.append(cost_s)
        if self._steps:
            self._choose()

    def _choose(self) -> None:
        """Works out what the interval loses; where it is chosen, all ranks take rank 0's."""
        step_s = statistics.median(self._steps)
        chosen = max(1, round(_FIRST_SAVE_S / step_s))
        given = self._settings.save_interval
        if self._costs and dist.get_rank() == 0:
            cost_s = statistics.median(self._costs)
            self.advice = advise(
                given or None, cost_s=cost_s, step_s=step_s, fault_s=self._fault_s, restart_s=self._restart_s
            )
            chosen = self.advice.best
            changed = max(chosen, self._told) > _WORTH_TELLING * min(chosen, self._told)
            if (given is None and changed) or not self._told:
                log.info("%s", self.advice)
                self._told = chosen
        if given is None:
            answer = [chosen]
            dist.broadcast_object_list(answer)
            self._chosen = answer[0]

    def as_dict(self) -> dict[str, Any] | None:
        """For performance.json: None before the first save."""
        return None if self.advice is None else asdict(self.advice)


def build_schedule(
    settings: CheckpointConfig, directory: RunDirectory, *, saved_at: int, resumed_at: int, restart_s: float
) -> SaveSchedule:
    """The schedule of an attempt, with what earlier ones have measured; called by all ranks, and rank 0 reads."""
    known: list[tuple[float, float | None]] = [(math.inf, None)]
    if dist.get_rank() == 0:
        known[0] = _fault_s(directory), _number(directory, "performance.json", "saving", "cost_s")
    dist.broadcast_object_list(known)
    fault_s, earlier_cost_s = known[0]
    return SaveSchedule(
        settings,
        resumed_at=resumed_at,
        saved_at=saved_at,
        fault_s=fault_s,
        restart_s=restart_s,
        earlier_cost_s=earlier_cost_s,
    )


def _fault_s(directory: RunDirectory) -> float:
    """Mean time between faults: of the nodes as the cluster file says, and of the run's attempts so far."""
    attempts = AttemptLog(directory.attempts).read()
    ended = [attempt for attempt in attempts if attempt.ended is not None]
    return seconds_between_faults(
        nodes=max(1, len(attempts[-1].nodes) if attempts else 1),
        hours_of_a_node=_number(directory, "job.json", "mean_hours_between_faults"),
        observed_s=sum(attempt.wall_s or 0.0 for attempt in ended),
        observed_faults=sum(attempt.reason in set(_FAULTS) for attempt in ended),
    )


def _number(directory: RunDirectory, file: str, *keys: str) -> float | None:
    """A positive number of a JSON file of the run; None where it is missing."""
    try:
        value = json.loads((directory.path / file).read_text())
        for key in keys:
            value = value[key]
        return float(value) if value and value > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
