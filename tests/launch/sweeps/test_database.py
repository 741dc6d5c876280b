"""Which process controls a study."""

import os
import socket
import sqlite3

import pytest

from launch.sweeps.database import STALE_S, Database
from megatron_qwen.errors import ConfigError


def changed(database: Database, assignment: str) -> None:
    with sqlite3.connect(database.path) as file:
        file.execute(f"UPDATE controller SET {assignment}")


@pytest.fixture
def database(tmp_path):
    """A study that this process controls."""
    found = Database(tmp_path / "state.sqlite")
    found.take()
    yield found
    found.close()


def test_a_live_controller_keeps_others_out(database):
    assert database.controller() == f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(ConfigError, match="is already controlling this study"):
        database.take()


def test_a_pid_that_another_process_got_since_is_no_controller(database):
    changed(database, "begun = begun - 60")  # it was a process of this number that began a minute before this one
    assert database.controller() is None
    database.take()


def test_a_controller_elsewhere_is_known_by_its_heartbeat_alone(database):
    changed(database, "host = 'elsewhere', begun = begun - 60")
    assert database.controller() == f"process {os.getpid()} on elsewhere"
    changed(database, f"seen = seen - {STALE_S + 1}")
    assert database.controller() is None
