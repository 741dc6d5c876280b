"""Tells people or their tools what happened to a run: a command or a webhook gets each event as JSON.

It is told by a thread, and what fails there is logged and forgotten: nothing about a run depends on it.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_qwen.attempts import now
from megatron_qwen.job.allocation import JobAllocation
from megatron_qwen.job.settings import Event, JobSettings
from megatron_qwen.resilience.policy import AttemptOutcome, Decision
from megatron_qwen.resilience.rules import Action, Reason
from megatron_qwen.rundir import RunDirectory, RunState
from megatron_qwen.secret_text import masked

log = logging.getLogger(__name__)
_VERSION = 1
# Of one command or request. Slurm sends SIGKILL KillWait seconds after a requeue, 30 by default. Chosen by hand.
_TIMEOUT_S, _LAST_S = 10.0, 12.0
_LONGEST_DETAIL = 500


@dataclass(frozen=True)
class EndedAttempt:
    """An attempt that has ended, as alerts tell of it.

    Args:
        number: of the attempt.
        nodes: where it ran.
        outcome: how it ended.
        decision: what follows.
        state: of the run now.
        excluded_before: nodes that were avoided already.
        unrecorded: whether its controller had died, so that this one has found its end.
    """

    number: int
    nodes: Sequence[str]
    outcome: AttemptOutcome
    decision: Decision
    state: RunState
    excluded_before: Sequence[str] = ()
    unrecorded: bool = False

    @property
    def newly_excluded(self) -> list[str]:
        """Nodes that are avoided from now on."""
        return sorted(set(self.decision.exclude) - set(self.excluded_before))

    def events(self) -> Iterator[Event]:
        """What there is to tell, the most urgent first."""
        if self.decision.action is Action.STOP:
            yield "stopped"
        if self.unrecorded and self.outcome.reason is not Reason.REQUEUED:
            yield "lost"
        if self.outcome.reason is Reason.HANG:
            yield "hang"
        if self.newly_excluded:
            yield "node_excluded"
        if self.state is RunState.REQUEUED or self.decision.action is Action.RESTART:
            yield "requeued"
        if self.state is RunState.DONE:
            yield "done"
        if self.state is RunState.CANCELLED:
            yield "cancelled"


class Alerts:
    """Tells events of one run.

    Args:
        directory: of the run.
        settings: of the job.
        allocation: of the job.
        environ: has the URL of the webhook, and the values that are masked.
    """

    def __init__(
        self,
        directory: RunDirectory,
        settings: JobSettings,
        allocation: JobAllocation,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._directory, self._settings, self._allocation, self._environ = directory, settings, allocation, environ
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._said: set[str] = set()

    def tell(self, ended: EndedAttempt) -> None:
        """Tells what is worth telling of an attempt; returns at once."""
        if self._settings.alert_command or self._settings.alert_webhook_variable:
            for event in ended.events():
                if event in self._settings.alert_on:
                    self._waiting.put(self._payload(event, ended))
            if self._thread is None and not self._waiting.empty():
                self._thread = threading.Thread(target=self._work, name="mq alerts", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Waits some seconds for what is still being told."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(_LAST_S)

    def _payload(self, event: Event, ended: EndedAttempt) -> dict[str, Any]:
        """What is sent; docs/slurm.md lists the fields."""
        outcome = ended.outcome
        return {
            "version": _VERSION,
            "event": event,
            "time": now(),
            "run": self._directory.path.name,
            "run_dir": str(self._directory.path),
            "state": str(ended.state),
            "attempt": ended.number,
            "job_id": self._allocation.job_id,
            "reason": str(outcome.reason),
            "detail": masked(outcome.detail, self._environ)[:_LONGEST_DETAIL],
            "iteration": outcome.iteration,
            "saved_iteration": outcome.saved,
            "nodes": list(ended.nodes),
            "failed_nodes": list(outcome.failed_nodes),
            "newly_excluded_nodes": ended.newly_excluded,
        }

    def _work(self) -> None:
        # After a requeue Slurm sends SIGTERM to every process of the job. A child inherits the blocked signal, and so
        # can end its work.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        while (payload := self._waiting.get()) is not None:
            content = json.dumps(payload).encode()
            if command := self._settings.alert_command:
                self._try(f"alert_command {command[0]}", partial(_call, command, content))
            if (variable := self._settings.alert_webhook_variable) is not None:
                self._try(f"the webhook of ${variable}", partial(self._post, variable, content))

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a program or a server of others does
            # Not the text of the error, which may hold the URL.
            why = _kind(error)
            if f"{what}: {why}" not in self._said:
                self._said.add(f"{what}: {why}")
                log.warning("%s has not taken an event: %s", what, why)

    def _post(self, variable: str, content: bytes) -> None:
        url = self._environ.get(variable, "")
        if not url.startswith(("https://", "http://")):
            raise _NoURLError
        # Here, because every `mq launch` imports this file.
        import urllib.request

        request = urllib.request.Request(url, data=content, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            pass  # an answer that is no success has raised HTTPError


class _NoURLError(Exception):
    """The variable has no URL in it."""


def _call(command: Sequence[str], content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # it need not read what it gets
        done = subprocess.run(
            list(command), input=content, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=_TIMEOUT_S
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command[0])


def _kind(error: Exception) -> str:
    if isinstance(error, _NoURLError):
        return "the variable is not set, or holds no http or https URL"
    if isinstance(error, subprocess.CalledProcessError):
        return f"it ended with code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired | TimeoutError):
        return f"it took longer than {_TIMEOUT_S:.0f} s"
    if (status := getattr(error, "code", None)) is not None:  # urllib.error.HTTPError
        return f"it answered with HTTP status {status}"
    cause = getattr(error, "reason", error)  # of urllib.error.URLError
    return getattr(cause, "strerror", None) or type(cause).__name__
