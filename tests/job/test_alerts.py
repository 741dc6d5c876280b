"""What is told of a run, to a real command and a real server, and that neither can hurt the run."""

import http.server
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.job import alerts
from megatron_qwen.job.alerts import Alerts, EndedAttempt
from megatron_qwen.job.settings import EVENTS, JobSettings
from megatron_qwen.resilience.policy import AttemptOutcome, Decision
from megatron_qwen.resilience.rules import Action, Reason
from megatron_qwen.rundir import RunDirectory, RunState
from tests.job.controllers import Job, controller

AGAIN = Decision(Action.REQUEUE, "why", 76, ("n1",))
STOP = Decision(Action.STOP, "why", 93, ())
HANG = AttemptOutcome(Reason.HANG, "no heartbeat for 900 s", ("n2",), iteration=7, gained=2, saved=5)
PEER = AttemptOutcome(Reason.LOST_PEER, "killed")


@pytest.mark.parametrize(
    ("ended", "events"),
    [
        (EndedAttempt(1, (), HANG, AGAIN, RunState.REQUEUED, ("n1",)), ["hang", "requeued"]),
        (EndedAttempt(1, (), HANG, AGAIN, RunState.REQUEUED), ["hang", "node_excluded", "requeued"]),
        (EndedAttempt(1, (), PEER, STOP, RunState.STOPPED), ["stopped"]),
        (EndedAttempt(1, (), PEER, AGAIN, RunState.REQUEUED, ("n1",), unrecorded=True), ["lost", "requeued"]),
        (
            EndedAttempt(
                1, (), AttemptOutcome(Reason.REQUEUED, ""), AGAIN, RunState.REQUEUED, ("n1",), unrecorded=True
            ),
            ["requeued"],
        ),
        (
            EndedAttempt(1, (), AttemptOutcome(Reason.FINISHED, ""), Decision(Action.NONE, "", 0, ()), RunState.DONE),
            ["done"],
        ),
        (
            EndedAttempt(
                1, (), AttemptOutcome(Reason.CANCELLED, ""), Decision(Action.NONE, "", 143, ()), RunState.CANCELLED
            ),
            ["cancelled"],
        ),
    ],
)
def test_events(ended, events):
    assert list(ended.events()) == events


@contextmanager
def server(status: int = 200, *, wait_s: float = 0.0) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server on this machine: its URL, and type and body of what was posted."""
    got: list[tuple[str, bytes]] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.headers["Content-Type"], body))
            time.sleep(wait_s)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/hook/not-for-logs", got
        running.shutdown()


def told(tmp_path, environ, *ended: EndedAttempt, **settings) -> None:
    directory = RunDirectory(tmp_path / "7b-first")
    job = JobSettings(scheduler="slurm", signal_delay_s=10, **{"alert_on": EVENTS, **settings})
    alert = Alerts(directory, job, Job(job, 2, job_id="17"), environ)
    for one in ended:
        alert.tell(one)
    alert.close()


def test_a_command_and_a_webhook(tmp_path):
    command = ("sh", "-c", 'cat >> "$0"; echo >> "$0"', str(tmp_path / "got"))
    secret = "correct-horse-battery"
    outcome = AttemptOutcome(Reason.HANG, f"cannot reach http://me:{secret}@host", ("n2",), iteration=7, saved=5)
    with server() as (url, posted):
        told(
            tmp_path,
            {"HOOK": url, "HOST_PASSWORD": secret},
            EndedAttempt(3, ("n1", "n2"), outcome, AGAIN, RunState.REQUEUED),
            alert_command=command,
            alert_webhook_variable="HOOK",
            alert_on=("hang", "stopped", "node_excluded"),
        )
    by_command = [json.loads(line) for line in (tmp_path / "got").read_text().splitlines()]
    assert [one["event"] for one in by_command] == ["hang", "node_excluded"]
    assert [json.loads(body) for _, body in posted] == by_command
    assert {kind for kind, _ in posted} == {"application/json"}
    first = by_command[0]
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "version": 1,
        "event": "hang",
        "run": "7b-first",
        "run_dir": str(tmp_path / "7b-first"),
        "state": "requeued",
        "attempt": 3,
        "job_id": "17",
        "reason": "hang",
        "detail": "cannot reach http://me:***@host",
        "iteration": 7,
        "saved_iteration": 5,
        "nodes": ["n1", "n2"],
        "failed_nodes": ["n2"],
        "newly_excluded_nodes": ["n1"],
    }


def test_nothing_is_told_where_nobody_listens(tmp_path):
    alert = Alerts(
        RunDirectory(tmp_path), JobSettings(scheduler="slurm", signal_delay_s=10, alert_on=EVENTS), Job(None, 2), {}
    )
    alert.tell(EndedAttempt(1, (), HANG, AGAIN, RunState.REQUEUED))
    alert.close()
    assert alert._thread is None


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("false",), "it ended with code 1"),
        (("/none/of/this",), "No such file or directory"),
        (("sleep", "20"), "it took longer than 0 s"),
        (("true",), None),
    ],
)
def test_a_command_that_fails(tmp_path, monkeypatch, caplog, command, why):
    monkeypatch.setattr(alerts, "_TIMEOUT_S", 0.3)
    with caplog.at_level(logging.WARNING):
        ended = EndedAttempt(1, (), HANG, AGAIN, RunState.REQUEUED)
        told(tmp_path, {}, ended, ended, alert_command=command)
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if why is None else [f"alert_command {command[0]} has not taken an event: {why}"])


@pytest.mark.parametrize(
    ("status", "wait_s", "why"), [(403, 0, "it answered with HTTP status 403"), (200, 2, "it took longer than 0 s")]
)
def test_a_server_that_fails(tmp_path, monkeypatch, caplog, status, wait_s, why):
    monkeypatch.setattr(alerts, "_TIMEOUT_S", 0.3)
    with caplog.at_level(logging.WARNING), server(status, wait_s=wait_s) as (url, posted):
        told(
            tmp_path,
            {"HOOK": url},
            EndedAttempt(1, (), HANG, AGAIN, RunState.REQUEUED),
            alert_webhook_variable="HOOK",
            alert_on=("hang",),
        )
        assert len(posted) == 1
    assert [record.getMessage() for record in caplog.records] == [f"the webhook of $HOOK has not taken an event: {why}"]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "the variable is not set, or holds no http or https URL"),
        ("file:///etc/passwd", "the variable is not set, or holds no http or https URL"),
        ("http://127.0.0.1:1/not-for-logs", "Connection refused"),
        ("http://[not-for-logs/", "ValueError"),
    ],
)
def test_a_url_that_leads_nowhere(tmp_path, caplog, url, why):
    with caplog.at_level(logging.WARNING):
        ended = EndedAttempt(1, (), HANG, AGAIN, RunState.REQUEUED)
        told(tmp_path, {"HOOK": url}, ended, alert_webhook_variable="HOOK", alert_on=("hang",))
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == f"the webhook of $HOOK has not taken an event: {why}"
    assert "not-for-logs" not in said


def test_what_a_controller_tells(tmp_path):
    """Of attempts whose controller died with a node, which is avoided from now on; then of a run that is stopped."""
    found = controller(tmp_path, job_id="7", lost=("n2",))
    got = tmp_path / "got"
    settings = JobSettings(
        scheduler="slurm",
        signal_delay_s=60,
        alert_command=("sh", "-c", 'cat >> "$0"; echo >> "$0"', str(got)),
        alert_on=("stopped", "lost", "node_excluded"),
    )
    found.alerts = Alerts(found.directory, settings, found.allocation, {})
    log = AttemptLog(found.directory.attempts)
    for _ in range(4):
        log.begin(nodes=["n1", "n2"], job_id="7", restarts=0)
        found._close_unfinished()
    found.alerts.close()
    events = [json.loads(line) for line in got.read_text().splitlines()]
    assert [(one["attempt"], one["event"]) for one in events] == [
        (1, "lost"), (2, "lost"), (2, "node_excluded"), (3, "lost"), (4, "stopped"), (4, "lost")
    ]  # fmt: skip
    assert events[2]["newly_excluded_nodes"] == ["n2"]
    assert events[4]["state"] == "stopped"
    assert all(one["nodes"] == ["n1", "n2"] for one in events)
