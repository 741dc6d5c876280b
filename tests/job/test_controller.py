"""What a controller makes of what an earlier one left. Whole jobs: tests/slurm, tests/launch/test_local.py."""

from dataclasses import dataclass

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.render import to_yaml
from megatron_qwen.job.allocation import Ending, LocalAllocation
from megatron_qwen.job.controller import JobController
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.resilience.heartbeat import Heartbeat
from megatron_qwen.resilience.policy import Action
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.rundir import RunDirectory, RunState


@dataclass(frozen=True)
class Job(LocalAllocation):
    """A job as its second start sees itself."""

    lost: tuple[str, ...] = ()
    does: Ending = Ending.NOTHING

    def lost_among(self, nodes):
        return tuple(name for name in nodes if name in self.lost)

    def ending(self):
        return self.does


def controller(tmp_path, **job) -> JobController:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.run_yaml.write_text(to_yaml(RECIPES["tiny_dense"]()))
    settings = JobSettings(scheduler="slurm", signal_delay_s=60)
    return JobController(directory, settings, Job(settings, 2, **job), StopSignals())


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"job_id": "7", "restarts": 1, "lost": ("n2",)}, "lost node"),
        ({"job_id": "7", "restarts": 1}, "lost peer"),
        ({"job_id": "7", "restarts": 0}, "lost peer"),
        ({"job_id": "8", "restarts": 0}, "lost peer"),
    ],
)
def test_an_attempt_whose_end_nobody_noted(tmp_path, job, reason):
    found = controller(tmp_path, **job)
    log = AttemptLog(found.directory.attempts)
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
    found._close_unfinished()
    (attempt,) = log.read()
    assert attempt.reason == reason
    assert attempt.failed_nodes == (("n2",) if reason == "lost node" else ())
    found._close_unfinished()
    assert len(log.read()) == 1


def test_an_attempt_that_made_steps_was_requeued(tmp_path):
    found = controller(tmp_path, job_id="7", restarts=1)
    log = AttemptLog(found.directory.attempts)
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
    Heartbeat(found.directory.heartbeat, attempt=1, resumed_at=0).beat("training", 5)
    assert found._close_unfinished() is None
    (attempt,) = log.read()
    assert (attempt.reason, attempt.iteration) == ("requeued by hand", 5)


@pytest.mark.parametrize("job", [{"job_id": "8"}, {"job_id": "7", "restarts": 1}])
def test_a_run_whose_first_node_dies_every_time_is_stopped(job, tmp_path):
    """Another job goes on with it, or Slurm has requeued the same one and says nothing of the node, which is back."""
    found = controller(tmp_path, **job)
    log = AttemptLog(found.directory.attempts)
    decisions = []
    for _ in range(4):  # the first is no restart; resilience.max_restarts_without_progress is 3
        log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
        decisions.append(found._close_unfinished())
    assert decisions[:3] == [None, None, None]
    assert decisions[3] is not None
    assert decisions[3].action is Action.STOP
    assert found._settled() == 93
    assert [attempt.exit_code for attempt in log.read()] == [None] * 4


def test_a_node_that_was_lost_twice_is_left(tmp_path):
    found = controller(tmp_path, job_id="7", lost=("n2",), nodes=("n2", "n3"))
    log = AttemptLog(found.directory.attempts)
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
    assert found._close_unfinished() is None
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=1)
    decision = found._close_unfinished()
    assert decision is not None
    assert (decision.action, decision.exclude) == (Action.REQUEUE, ("n2",))
    log.forgive()
    log.begin(nodes=["n1", "n2"], job_id="7", restarts=2)
    assert found._close_unfinished() is None


@pytest.mark.parametrize(
    ("state", "code"),
    [(RunState.DONE, 0), (RunState.STOPPED, 93), (RunState.CANCELLED, 93), (RunState.QUEUED, None), (None, None)],
)
def test_runs_that_need_no_attempt(tmp_path, state, code):
    found = controller(tmp_path)
    if state is not None:
        found.directory.write_status(state)
    assert found._settled() == code


def test_a_cancelled_job_is_not_brought_back(tmp_path):
    found = controller(tmp_path, does=Ending.CANCELLED)
    assert found._cancelled()
    (tmp_path / "other").mkdir()
    by_command = controller(tmp_path / "other")
    assert not by_command._cancelled()
    by_command.directory.write_status(RunState.CANCELLED)
    assert by_command._cancelled()
