"""uvicorn in a thread: the main thread has the loop of the ranks, and the signals."""

import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

_START_S = 30.0
_GRACE_S = 30  # for replies that are still being sent when all is answered
_BACKLOG = 2048


class HttpServer:
    """An HTTP server of an application.

    Args:
        app: the application.
        host: address.
        port: 0 takes a free one.
        failed: called if it ends by itself.

    Attributes:
        error: why it could not start, or has ended; None if all is well.
        port: that it listens at.
    """

    def __init__(self, app: FastAPI, host: str, port: int, *, failed: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._told_to_stop = False
        self.port, self._failed = port, failed
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket: socket.socket | None = socket.create_server((host, port), family=family, backlog=_BACKLOG)
            self.port = self._socket.getsockname()[1]
        except OSError as error:
            self._socket, self.error = None, error
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S, lifespan="off"
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> bool:
        """Begins to listen; False if it cannot."""
        if self._socket is None:
            return False
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if not self._server.started:
            self.error = self.error or TimeoutError(f"it did not start within {_START_S:.0f} s")
        return self._server.started

    def stop(self) -> None:
        """Ends when the replies have been sent."""
        self._told_to_stop = self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket] if self._socket is not None else None)
        except Exception as error:  # whatever uvicorn raises: the program must not end as if all were well
            self.error = error
        if not self._told_to_stop:
            self.error = self.error or RuntimeError("it has ended by itself")
            self._failed()
