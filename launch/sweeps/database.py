"""The state of a study in one SQLite file: what a controller knows, and which controller may act.

Everything in it follows from the run directories but the number of submissions and the reason of a run that never
began; when the file is lost it is recreated from them.
"""

import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_qwen.errors import ConfigError, Problem

WAITING, READY, ACTIVE = "waiting", "ready", "active"
# A controller that has not written for so long is taken for dead, on another machine at least.
STALE_S = 120.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, status TEXT NOT NULL, why TEXT NOT NULL DEFAULT '',
    loss REAL, iteration INTEGER NOT NULL DEFAULT 0, submissions INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS controller (
    id INTEGER PRIMARY KEY CHECK (id = 1), host TEXT NOT NULL, pid INTEGER NOT NULL, begun REAL NOT NULL,
    seen REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS place (id INTEGER PRIMARY KEY CHECK (id = 1), content TEXT NOT NULL);
"""


@dataclass(frozen=True)
class RunRow:
    """How a run stands.

    Args:
        name: of the run.
        kind: stem or cell.
        status: waiting (for its stem), ready, active, done, diverged or failed.
        why: one line.
        loss: final; None without one.
        iteration: last finished step.
        submissions: how often it was handed to the scheduler.
    """

    name: str
    kind: str
    status: str
    why: str = ""
    loss: float | None = None
    iteration: int = 0
    submissions: int = 0


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turns what SQLite complains of into one message."""
    try:
        yield
    except sqlite3.OperationalError as error:  # locked, read-only, no such folder
        raise ConfigError(Problem("state", path, f"cannot be used ({error}).")) from None
    except sqlite3.DatabaseError as error:
        fix = f"is not a readable database ({error}); move it away, and it is recreated from the runs."
        raise ConfigError(Problem("state", path, fix)) from None


class Database:
    """The file; every change is one transaction.

    Args:
        path: state.sqlite, made where it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _said(path):
            self._connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with _said(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def rows(self) -> dict[str, RunRow]:
        """All runs by name."""
        columns = "name, kind, status, why, loss, iteration, submissions"
        with _said(self.path):
            return {row[0]: RunRow(*row) for row in self._connection.execute(f"SELECT {columns} FROM runs")}

    def try_again(self) -> None:
        """Forgets refusals and lost jobs: a person wants the study to go on."""
        with self._writing() as connection:
            connection.execute("UPDATE runs SET submissions = 0")
            connection.execute("UPDATE runs SET status = ?, why = '' WHERE status = 'failed'", (READY,))

    def remember(self, place: str | None = None) -> str | None:
        """Where runs go, as JSON: keeps it, or answers with what was kept."""
        if place is not None:
            with self._writing() as connection:
                connection.execute("INSERT OR REPLACE INTO place (id, content) VALUES (1, ?)", (place,))
            return place
        with _said(self.path):
            found = self._connection.execute("SELECT content FROM place").fetchone()
        return None if found is None else str(found[0])

    def write(self, rows: list[RunRow]) -> None:
        """Replaces rows."""
        with self._writing() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO runs (name, kind, status, why, loss, iteration, submissions) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(r.name, r.kind, r.status, r.why, r.loss, r.iteration, r.submissions) for r in rows],
            )

    def take(self) -> None:
        """Makes this process the controller.

        Raises:
            ConfigError: another one is at work.
        """
        with self._writing() as connection:
            found = connection.execute("SELECT host, pid, begun, seen FROM controller").fetchone()
            if found is not None and not self._is_dead(*found):
                fix = "is already controlling this study, and its runs continue. See `mq sweep status`."
                raise ConfigError(Problem("controller", f"process {found[1]} on {found[0]}", fix))
            begun = psutil.Process().create_time()
            connection.execute("DELETE FROM controller")
            connection.execute(
                "INSERT INTO controller (id, host, pid, begun, seen) VALUES (1, ?, ?, ?, ?)",
                (socket.gethostname(), os.getpid(), begun, time.time()),
            )

    def beat(self) -> None:
        """Says that the controller is alive.

        Raises:
            ConfigError: another one has taken over.
        """
        with self._writing() as connection:
            changed = connection.execute(
                "UPDATE controller SET seen = ? WHERE host = ? AND pid = ?",
                (time.time(), socket.gethostname(), os.getpid()),
            ).rowcount
        if not changed:
            raise ConfigError(Problem("controller", os.getpid(), "was replaced by another controller and ends."))

    def leave(self) -> None:
        """Ends being the controller."""
        with self._writing() as connection:
            connection.execute("DELETE FROM controller WHERE host = ? AND pid = ?", (socket.gethostname(), os.getpid()))

    def controller(self) -> str | None:
        """Who is at work, in words; None where nobody is."""
        with _said(self.path):
            found = self._connection.execute("SELECT host, pid, begun, seen FROM controller").fetchone()
        return None if found is None or self._is_dead(*found) else f"process {found[1]} on {found[0]}"

    @staticmethod
    def _is_dead(host: str, pid: int, begun: float, seen: float) -> bool:
        if host != socket.gethostname():
            return time.time() - seen > STALE_S
        try:  # a number that another process got since is not it
            # Within a second: psutil derives the time from the boot time, which moves when the clock is corrected.
            return abs(psutil.Process(pid).create_time() - begun) > 1.0
        except psutil.Error:
            return True
