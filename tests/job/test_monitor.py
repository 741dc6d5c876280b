"""Where the metrics of a run go, and what becomes of them at its end."""

import logging
import stat
import time
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_qwen.job.monitor import Monitor
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.rundir import RunDirectory, RunState
from tests.slurm.cluster import free_ports


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    (tmp_path / "collected").mkdir()
    found.write_status(RunState.RUNNING)
    return found


def monitor(directory: RunDirectory, **settings) -> Monitor:
    collected = directory.path.parent / "collected"
    job = JobSettings(scheduler="local", signal_delay_s=10, metrics_directory=str(collected), **settings)
    return Monitor(directory, job, interval_s=0.05)


def wait(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_in(text: str) -> str:
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (state,) = (sample.labels["state"] for sample in families["mq_run_state"].samples if sample.value)
    return state


def test_files_and_a_port(directory):
    (port,) = free_ports(1)
    watched = monitor(directory, metrics_port=port)
    with watched:
        wait(lambda: directory.metrics_text.exists() and watched.collected.exists())
        assert stat.S_IMODE(watched.collected.stat().st_mode) == 0o644, "node_exporter is another user"
        directory.write_status(RunState.REQUEUED)
        wait(lambda: state_in(watched.collected.read_text()) == "requeued")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert state_in(answer.read().decode()) == "requeued"
        directory.write_status(RunState.DONE)
    assert state_in(watched.collected.read_text()) == state_in(directory.metrics_text.read_text()) == "done"
    names = [path.name for path in watched.collected.parent.iterdir()]
    assert names == [watched.collected.name], "and no temporary file"


def test_a_job_that_goes_on_elsewhere_leaves_nothing_on_this_node(directory):
    with monitor(directory) as watched:
        wait(lambda: watched.collected.exists())
        directory.write_status(RunState.REQUEUED)
    assert not watched.collected.exists()
    assert state_in(directory.metrics_text.read_text()) == "requeued"


def test_two_runs_of_one_name(directory, tmp_path):
    other = RunDirectory(tmp_path / "other" / "run")
    assert monitor(directory).collected.name != monitor(other).collected.name


def test_what_cannot_be_written_is_said_once(directory, caplog):
    (directory.path.parent / "collected").rmdir()
    (port,) = free_ports(1)
    with caplog.at_level(logging.WARNING), monitor(directory, metrics_port=port), monitor(directory, metrics_port=port):
        time.sleep(0.5)
    said = [record.getMessage() for record in caplog.records]
    assert sum("No such file or directory" in line for line in said) == 2, "once by each"
    assert sum(f"not served at port {port}: Address already in use" in line for line in said) == 1
    assert state_in(directory.metrics_text.read_text()) == "running"


def test_a_look_that_fails_does_not_end_the_job(directory, caplog):
    looks = []

    def broken(_):
        looks.append(1)
        raise ValueError("odd")

    job = JobSettings(scheduler="local", signal_delay_s=10)
    with caplog.at_level(logging.WARNING), Monitor(directory, job, interval_s=0.01, look=broken):
        wait(lambda: len(looks) > 3)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["odd"]
