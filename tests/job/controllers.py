"""Controllers of jobs whose attempts end as a test says."""

import errno
from dataclasses import dataclass, field

from megatron_qwen.config.render import to_yaml
from megatron_qwen.job.allocation import Ending, LocalAllocation
from megatron_qwen.job.controller import JobController
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.resilience.policy import AttemptOutcome
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory


@dataclass(frozen=True)
class Job(LocalAllocation):
    """A job as its second start sees itself."""

    lost: tuple[str, ...] = ()
    does: Ending = Ending.NOTHING
    comment: list[str] = field(default_factory=list)
    requeued: list[float] = field(default_factory=list)
    left: tuple[float | None, ...] = (None,)
    groups: list[tuple[str, ...]] = field(default_factory=list)  # nodes to avoid, of every look
    enough: bool = True

    def keep(self, word):
        self.comment[:] = [word]

    def kept(self, job_id):
        return "".join(self.comment) if job_id == self.job_id else ""

    def seconds_left(self):
        return self.left[0]

    def regroup(self, avoid):
        self.groups.append(tuple(avoid))
        enough = self.enough and set(avoid).isdisjoint(self.nodes)
        return None if enough else "2 healthy nodes are needed and the job has fewer"

    def requeue(self, *, delay_s=0.0):
        self.requeued.append(delay_s)

    def lost_among(self, nodes):
        return tuple(name for name in nodes if name in self.lost)

    def ending(self):
        return self.does


def controller(tmp_path, **job) -> JobController:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir(parents=True)
    directory.run_yaml.write_text(to_yaml(RECIPES["tiny_dense"]()))
    settings = JobSettings(scheduler="slurm", signal_delay_s=60)
    return JobController(directory, settings, Job(settings, 2, **job), StopSignals())


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def elsewhere(tmp_path, monkeypatch, **job) -> JobController:
    """A controller of a job that Slurm requeues, whose ranks end at once because the disk is full."""
    found = controller(tmp_path, job_id="7", requeues_in_place=False, **job)
    monkeypatch.setattr(found.making, "_with_ranks", full)
    return found


def faulty(tmp_path, monkeypatch, *reasons: Reason, **job) -> JobController:
    """A controller whose attempts end for these reasons, each with a newer checkpoint, and then finish."""
    found = elsewhere(tmp_path, monkeypatch, **job)
    ends = iter(reasons)

    def make(number: int) -> AttemptOutcome:
        reason = next(ends, Reason.FINISHED)
        nodes = ("n2",) if reason in (Reason.LOST_PEER, Reason.STRAGGLER, Reason.CORRUPTION) else ()
        return AttemptOutcome(reason, "it happened", nodes, gained=10, saved=10 * number)

    monkeypatch.setattr(found.making, "make", make)
    return found
