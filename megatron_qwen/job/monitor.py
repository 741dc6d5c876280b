"""Keeps the metrics of a run where Prometheus finds them: in files and, if asked for, at a port of the controller.

A thread of the controller does it. Nothing waits for it, and what it cannot write is logged once.
"""

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_qwen.files import atomic_write
from megatron_qwen.job.observation import RunObservation, observe
from megatron_qwen.job.prometheus import RunMetrics
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.rundir import RunDirectory, RunState

log = logging.getLogger(__name__)
# Prometheus asks node_exporter once in 15 s or more rarely. Chosen by hand.
_INTERVAL_S = 15.0
_LAST_S = 10.0
_OVER = (RunState.DONE, RunState.STOPPED, RunState.CANCELLED)


class Monitor:
    """Writes metrics while its block runs, and once more at its end.

    Args:
        directory: of the run; its metrics.prom is always written.
        settings: of the job.
        interval_s: between two writes.
        look: at the run.
    """

    def __init__(
        self,
        directory: RunDirectory,
        settings: JobSettings,
        *,
        interval_s: float = _INTERVAL_S,
        look: Callable[[RunDirectory], RunObservation] = observe,
    ) -> None:
        self._directory, self._settings, self._interval_s = directory, settings, interval_s
        self._metrics = RunMetrics(directory.path.name, lambda: look(directory))
        self._end, self._said = threading.Event(), set[str]()
        self._thread = threading.Thread(target=self._work, name="mq metrics", daemon=True)

    def __enter__(self) -> Self:
        """Begins."""
        if (port := self._settings.metrics_port) is not None:
            try:
                self._metrics.serve(port, self._settings.metrics_address)
            except OSError as error:
                log.warning("metrics are not served at port %d: %s", port, error.strerror)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes what the run has come to, unless its file system does not answer."""
        self._end.set()
        self._thread.join(_LAST_S)

    @property
    def collected(self) -> Path | None:
        """The file that node_exporter reads. Other runs of this name, of other people, have files of their own."""
        if self._settings.metrics_directory is None:
            return None
        path = self._directory.path
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
        return Path(self._settings.metrics_directory) / f"mq_{path.name}_{digest}.prom"

    def _work(self) -> None:
        while True:
            self._write(self._directory.metrics_text, mode=None)
            if self.collected is not None:
                self._write(self.collected, mode=0o644)  # node_exporter runs as another user
            if self._end.wait(self._interval_s):
                break
        self._write(self._directory.metrics_text, mode=None)
        if self.collected is None:
            return
        if self._directory.state() in _OVER:
            self._write(self.collected, mode=0o644)
        else:  # the next job writes on its own first node, which may be another one
            with contextlib.suppress(OSError):
                self.collected.unlink()

    def _write(self, path: Path, *, mode: int | None) -> None:
        try:
            atomic_write(path, self._metrics.text())
            if mode is not None:
                path.chmod(mode)
        except Exception as error:  # a file of the run that nobody has foreseen must not end the thread
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            if f"{path} {why}" not in self._said:
                self._said.add(f"{path} {why}")
                log.warning("metrics could not be written to %s: %s", path, why)
