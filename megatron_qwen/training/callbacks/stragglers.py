"""Compares the ranks' own times every few steps, and names those that the others wait for."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_qwen import device
from megatron_qwen.config.resilience import ResilienceConfig
from megatron_qwen.errors import EXIT_REQUEUE
from megatron_qwen.metrics.straggler_file import StragglerFile
from megatron_qwen.resilience.straggler_leave import StragglerLeave
from megatron_qwen.resilience.stragglers import RankTimes, StragglerScoring, WindowScores
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.gemm_probe import GemmProbe
from megatron_qwen.training.rank_places import RankPlace, places_of_ranks
from megatron_qwen.training.step_clock import StepClock, Waits
from megatron_qwen.training.step_record import StepRecord

log = logging.getLogger(__name__)
# A record of metrics.jsonl stays short whatever happens: mq launch status reads its last 4 KiB.
_LISTED = 8
# Share of a step up to which waits for data do not count where ranks share cores. Chosen by hand.
_SHARED_CORES_DATA_WAIT = 0.1
# Ranks that rank 0 may score for every step of a window; all wait for it meanwhile. Chosen by hand.
_RANKS_A_STEP = 500
# What a rank tells of a step: RankTimes, and the time of the probe.
_FIGURES = len(RankTimes._fields) + 1


class Moment(NamedTuple):
    """Readings of a rank's clocks: seconds since some time, and its waits so far."""

    time_s: float
    waits: Waits

    def until(self, later: "Moment") -> float:
        """Seconds of own work: without waits for other ranks and for a core."""
        waits = later.waits.since(self.waits)
        return later.time_s - self.time_s - waits.communication_s - waits.queued_s


class EndOfCallbacks(Callback):
    """Tells ``Stragglers`` when the callbacks of a step are done; the last in the list.

    Args:
        stragglers: the callback.
    """

    def __init__(self, stragglers: "Stragglers") -> None:
        self.stragglers = stragglers

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Tells it."""
        self.stragglers.callbacks_done()


class Stragglers(Callback):
    """Measures every rank with its own clocks, gathers a window's medians in one message, and scores them on rank 0.

    Args:
        settings: interval, threshold, windows.
        group: the ranks that are compared: all of the run.
        path: stragglers.jsonl.
        attempt: number of this attempt.
        resumed_at: iteration that training resumes from.
        leave: decides on rank 0 whether the attempt ends because of stragglers; None where it never does.
    """

    def __init__(
        self,
        settings: ResilienceConfig,
        *,
        group: dist.ProcessGroup,
        path: Path,
        attempt: int,
        resumed_at: int,
        leave: StragglerLeave | None = None,
    ) -> None:
        self.settings, self.group, self.path, self.leave = settings, group, path, leave
        self.attempt, self.resumed_at = attempt, resumed_at
        self._rank = dist.get_rank(group)
        self.interval = window_steps(settings, dist.get_world_size(group))
        self._clock = StepClock()
        self._window: list[RankTimes] = []
        self._places: list[RankPlace] = []
        self._scoring: StragglerScoring | None = None
        self._file: StragglerFile | None = None
        self._probe: GemmProbe | None = None
        self._scores: WindowScores | None = None
        self._saving = self._saving_before = 0.0
        self._mark = self._callbacks_done = self._now()

    def before_training(self, trainer: TrainerInterface) -> None:
        """Learns where every rank runs and which ranks do the same work."""
        stage = int(trainer.components.groups.pp.rank())
        self._places = places = places_of_ranks(
            self.group, stage=stage, sees_queue=self._clock.sees_queue or not self._clock.is_there
        )
        if device.has_cuda():
            self._probe = GemmProbe(device.current())
        if self._rank == 0:
            nodes = [place.node for place in places]
            self._scoring = StragglerScoring(
                [place.stage for place in places],
                nodes,
                threshold=self.settings.straggler_threshold,
                windows=self.settings.straggler_windows,
            )
            try:
                self._file = StragglerFile(self.path, attempt=self.attempt, resumed_at=self.resumed_at, nodes=nodes)
            except OSError as error:
                log.warning("%s could not be written: %s", self.path, error)
        self._mark = self._callbacks_done = self._now()

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Takes the step's times; at the end of a window compares all ranks'."""
        now = self._now()
        self._saving_before, self._saving = self._saving, sum(trainer.callback_seconds.values())
        if record.iteration > self.resumed_at + 1:  # the first step compiles and allocates
            self._window.append(self._times(record, now))
        self._mark = now
        if record.iteration % self.interval == 0:
            self._compare(trainer, record)
        if self._scores is not None and self._scores.stragglers:
            record.extra["stragglers"] = [
                {"rank": one.rank, "node": one.node, "score": round(one.score, 3), "cause": one.cause}
                for one in self._scores.stragglers[:_LISTED]
            ]
            record.extra["straggler_count"] = len(self._scores.stragglers)

    def close(self) -> None:
        """Writes the windows that are not in the file yet."""
        self._write(lambda file: file.close())

    def callbacks_done(self) -> None:
        """All callbacks of a step have acted on this rank."""
        self._callbacks_done = self._now()

    def _now(self) -> Moment:
        return Moment(time.perf_counter(), self._clock.read())

    def _times(self, record: StepRecord, now: Moment) -> RankTimes:
        """This rank's times of the step that has just ended, and of what was before it."""
        own = record.step_time_s - record.data_wait_s - record.communication_s - record.queued_s
        # Callbacks are not compared where they have more to do, on rank 0 and in saves, nor where waits are not timed:
        # a callback that waits for others would look like work.
        plain = self._rank > 0 and self._saving == self._saving_before and self._clock.is_there
        before = (self._mark if plain else self._callbacks_done).until(now)
        inside = record.step_time_s - record.communication_s - record.queued_s
        return RankTimes(
            compute=max(own, 0.0),
            data=record.data_wait_s,
            host=max(before - inside, 0.0),
            cores=record.queued_s,
            communication=record.communication_s,
            step=record.step_time_s,
        )

    def _compare(self, trainer: TrainerInterface, record: StepRecord) -> None:
        steps = len(self._window)
        medians = [statistics.median(values) for values in zip(*self._window, strict=True)]
        self._window.clear()
        probe = math.nan if self._probe is None else self._probe.seconds()
        place = trainer.components.batch_slice.device
        mine = torch.tensor([*(medians or [math.nan] * (_FIGURES - 1)), probe], dtype=torch.float64, device=place)
        everyone = mine.new_empty(dist.get_world_size(self.group) * _FIGURES)
        dist.all_gather_into_tensor(everyone, mine, group=self.group)
        if self._scoring is not None and steps:
            rows = everyone.view(-1, _FIGURES).tolist()
            times = _times_of_ranks(rows)
            work = (record.global_batch_size, record.config.data.seq_length)
            fair = [_comparable(*one) for one in zip(times, self._places, strict=True)]
            self._scores = self._scoring.add(fair, steps=steps, work=work)
            self._tell(record, times, self._scores)
        if self.leave is not None:
            self._leave_together(self.leave, trainer)

    def _leave_together(self, leave: StragglerLeave, trainer: TrainerInterface) -> None:
        """Ends the attempt on all ranks if rank 0 says so; the checkpoint callback then saves."""
        wanted = False
        if self._scoring is not None and self._scores is not None:
            wanted = leave.wanted(self._scores, nodes=len(set(self._scoring.nodes)))
        flag = torch.tensor([int(wanted)], device=trainer.components.batch_slice.device)
        dist.broadcast(flag, 0, group=self.group)
        if int(flag):
            trainer.stop(EXIT_REQUEUE)

    def _tell(self, record: StepRecord, times: Sequence[RankTimes], found: WindowScores) -> None:
        """Log, metrics and stragglers.jsonl."""
        for one in found.named[:_LISTED]:
            log.warning("step %d: %s", record.iteration, one)
        if len(found.named) > _LISTED:
            log.warning("step %d: %d more ranks are slow", record.iteration, len(found.named) - _LISTED)
        if found.named and found.nodes:
            log.warning("step %d: most ranks of %s are slow", record.iteration, ", ".join(found.nodes))
        if found.back:
            log.info("step %d: back at their peers' speed: ranks %s", record.iteration, ", ".join(map(str, found.back)))
        known = [(score, rank) for rank, score in enumerate(found.scores) if not math.isnan(score)]
        if known:
            record.extra["slowest_rank_score"], record.extra["slowest_rank"] = min(known)
        waits = [one.communication for one in times if not math.isnan(one.communication)]
        if waits:
            record.extra["communication_wait_s"] = statistics.median(waits)
        figures = {
            "score": found.scores,
            "compute_s": [one.compute for one in times],
            "communication_s": [one.communication for one in times],
            "data_s": [one.data for one in times],
            "host_s": [one.host for one in times],
        }
        self._write(lambda file: file.add(record.iteration, figures))

    def _write(self, write: Callable[[StragglerFile], None]) -> None:
        if self._file is None:
            return
        try:
            write(self._file)
        except OSError as error:  # a full disk must not end the run
            log.warning("%s could not be written: %s", self.path, error)


def window_steps(settings: ResilienceConfig, ranks: int) -> int:
    """Steps of a window: more than asked for above 2,500 ranks, because rank 0 scores them one after the other."""
    return max(settings.straggler_interval, ranks // _RANKS_A_STEP)


def _comparable(times: RankTimes, place: RankPlace) -> RankTimes:
    """The times without what is due to ranks that share their cores: threads, the loader's too, wait for one another.

    On eight ranks that shared two cores a median of five steps held up to 6 % of a step of waits for data, at random.
    """
    if not place.crowded:
        return times
    if not place.sees_queue:  # nothing can be said of such ranks
        return RankTimes(*[math.nan] * len(times))
    return times._replace(cores=0.0, data=max(0.0, times.data - _SHARED_CORES_DATA_WAIT * times.step))


def _times_of_ranks(rows: Sequence[Sequence[float]]) -> list[RankTimes]:
    """From what the ranks sent.

    On a GPU the host only launches a step's work, and its clocks tell nothing of it. There the probe tells how fast a
    rank computes. It is scaled to a step, so that a wait for data weighs as much against it as in the step. What all
    ranks wait for the slowest loader is no work.
    """
    times = [RankTimes(*row[:-1]) for row in rows]
    probes = [row[-1] for row in rows]
    known = [probe for probe in probes if probe > 0]
    if not known:
        return times
    work_s = statistics.median(one.step for one in times) - max(one.data for one in times)
    usual = statistics.median(known)
    return [
        one._replace(compute=max(work_s, 0.0) * probe / usual, communication=math.nan)
        for one, probe in zip(times, probes, strict=True)
    ]
