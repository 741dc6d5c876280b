"""What a job's process does around its controller, where no attempt can be made."""

import json
import sys

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.render import to_yaml
from megatron_qwen.errors import EXIT_DO_NOT_REQUEUE
from megatron_qwen.job import call, environment
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory, RunState
from tests.job.test_monitor import state_in


@pytest.fixture
def directory(tmp_path, monkeypatch) -> RunDirectory:
    """A run on this machine, whose events go to a file."""
    monkeypatch.setattr(call, "_log_to", lambda _: None)
    monkeypatch.setattr(call.StopSignals, "install", lambda _: None)
    monkeypatch.setattr(call.signal, "signal", lambda *_: None)
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    found.run_yaml.write_text(to_yaml(RECIPES["tiny_dense"]()))
    found.write_status(RunState.QUEUED)
    command = ("sh", "-c", 'cat >> "$0"', str(tmp_path / "got"))
    settings = JobSettings(
        scheduler="local", signal_delay_s=10, python=sys.executable, alert_command=command, alert_on=("stopped",)
    )
    settings.write(found.path)
    environment.record(found.path, settings)
    return found


def test_a_run_with_other_packages_is_stopped_and_everybody_is_told(directory, monkeypatch):
    path = directory.path / environment.NAME
    content = json.loads(path.read_text())
    content["packages"]["torch"]["version"] = "2.0"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(environment, "_PATIENCE_S", -1.0)
    assert call.control(directory.path) == EXIT_DO_NOT_REQUEUE
    assert AttemptLog(directory.attempts).read() == []
    status = json.loads(directory.status.read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", EXIT_DO_NOT_REQUEUE)
    assert "environment changed: environment = " in status["reason"]
    event = json.loads((directory.path.parent / "got").read_text())
    assert (event["event"], event["state"], event["attempt"]) == ("stopped", "stopped", 0)
    assert "torch 2.0 -> " in event["detail"]
    assert state_in(directory.metrics_text.read_text()) == "stopped"


def test_a_run_whose_configuration_cannot_be_read_has_its_last_metrics(directory):
    directory.run_yaml.write_text("recipe: tiny_dense\ntraining:\n  train_iters: none\n")
    assert call.control(directory.path, world_size=1) == EXIT_DO_NOT_REQUEUE
    assert directory.state() is RunState.STOPPED
    assert state_in(directory.metrics_text.read_text()) == "stopped"
