"""What a controller looks at when the ranks of an attempt have ended."""

import signal
from dataclasses import dataclass

import pytest

from megatron_qwen.job.ranks import TaskEnd
from tests.job.controllers import elsewhere


@dataclass(frozen=True)
class EndedRanks:
    """Ranks that have ended."""

    tasks: tuple[TaskEnd, ...]
    down: tuple[str, ...] = ()

    def poll(self):
        return 137

    def ends(self):
        return list(self.tasks)

    def nodes_of_ranks(self):
        return {0: "n1", 1: "n2"}

    def failed_nodes(self):
        return self.down


@pytest.mark.parametrize(
    ("code", "down", "asked"), [(-signal.SIGKILL, (), 1), (1, (), 1), (-signal.SIGKILL, ("n2",), 0), (75, (), 0)]
)
def test_counters_are_read_where_something_broke(tmp_path, monkeypatch, code, down, asked):
    """A node that is down does not answer; ranks that saved and left have broken nothing."""
    found, looks = elsewhere(tmp_path, monkeypatch), []
    monkeypatch.setattr("megatron_qwen.job.attempt._NODE_STATE_WAIT_S", 0.0)
    monkeypatch.setattr(found.making, "_counted_since", lambda logs, ending: looks.append(logs) or {})
    found.making._ended(EndedRanks((TaskEnd(1, "n2", code),), down), 1, tmp_path, seconds=9.0)
    assert len(looks) == asked
