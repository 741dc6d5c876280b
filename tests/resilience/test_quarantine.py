"""Nodes that runs avoid for a time, in files that runs share."""

import datetime
import json

import pytest

from megatron_qwen.resilience import quarantine
from megatron_qwen.resilience.quarantine import Quarantine, QuarantineEvidence, moment_of


def failure(attempt: int, run: str = "/runs/a", detail: str = "rank 1 was killed") -> QuarantineEvidence:
    return QuarantineEvidence(run, attempt, "lost peer", detail, "2026-01-01T00:00:00+00:00")


class Clock:
    """A time that a test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        monkeypatch.setattr(quarantine, "utc_now", lambda: self.now)

    def pass_hours(self, hours: float) -> None:
        self.now += datetime.timedelta(hours=hours)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def store(tmp_path) -> Quarantine:
    return Quarantine(tmp_path / "runs" / quarantine.NAME)


def names(store: Quarantine) -> list[str]:
    return [entry.node for entry in store.in_force()]


def test_a_node_is_avoided_until_its_time_is_over(store, clock):
    assert names(store) == []
    assert not store.path.exists()
    store.put("n3", hours=24, by="controller", why="failed twice", evidence=[failure(1), failure(2)])
    (entry,) = store.in_force()
    assert (entry.node, entry.by, entry.why, entry.runs) == ("n3", "controller", "failed twice", ("/runs/a",))
    assert (entry.since, entry.until) == ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00")
    clock.pass_hours(23.9)
    assert names(store) == ["n3"]
    clock.pass_hours(0.2)
    assert names(store) == []


def test_a_persons_word_stays_a_persons(store, clock):
    store.put("n3", hours=48, by="ann", why="its fan is loud")
    clock.pass_hours(1)
    entry = store.put("n3", hours=72, by="controller", why="failed twice", evidence=[failure(1)])
    assert (entry.by, entry.why, entry.runs) == ("ann", "its fan is loud", ("/runs/a",))
    assert entry.until == "2026-01-04T01:00:00+00:00"
    store.lift("n3")
    assert store.put("n3", hours=1, by="controller", why="failed twice").by == "controller"


def test_more_evidence_is_added_and_the_longer_time_holds(store, clock):
    store.put("n3", hours=48, by="controller", why="first", evidence=[failure(1), failure(2)])
    clock.pass_hours(1)
    entry = store.put("n3", hours=24, by="ann", why="second", evidence=[failure(2), failure(1, run="/runs/b")])
    assert [(one.run, one.attempt) for one in entry.evidence] == [("/runs/a", 1), ("/runs/a", 2), ("/runs/b", 1)]
    assert (entry.since, entry.until) == ("2026-01-01T00:00:00+00:00", "2026-01-03T00:00:00+00:00")
    assert (entry.by, entry.why, entry.runs) == ("ann", "second", ("/runs/a", "/runs/b"))
    clock.pass_hours(100)
    again = store.put("n3", hours=1, by="controller", why="third", evidence=[failure(9)])
    assert [one.attempt for one in again.evidence] == [9], "what has expired is not evidence any more"


def test_a_file_stays_small(store, clock):
    for attempt in range(40):
        store.put("n3", hours=24, by="controller", why="w" * 9999, evidence=[failure(attempt, detail="d" * 9999)])
    (entry,) = store.in_force()
    assert [one.attempt for one in entry.evidence] == list(range(32, 40))
    assert (store.path / "n3.json").stat().st_size < 5000


def test_lifting(store, clock):
    store.put("n3", hours=24, by="controller", why="failed")
    store.put("n4", hours=24, by="controller", why="failed")
    clock.pass_hours(1)
    assert store.lift("n3")
    assert not store.lift("n3")
    assert not store.lift("n9")
    assert names(store) == ["n4"]
    assert store.lifted() == {"n3": "2026-01-01T01:00:00+00:00"}
    store.put("n3", hours=24, by="controller", why="again", evidence=[failure(7)])
    assert set(names(store)) == {"n3", "n4"}
    assert store.lifted() == {}


def test_files_of_long_ago_are_removed(store, clock):
    store.put("n3", hours=1, by="controller", why="failed")
    store.put("n4", hours=500, by="controller", why="failed")
    clock.pass_hours(24)
    store.put("n5", hours=24, by="controller", why="failed")
    assert sorted(path.name for path in store.path.glob("*.json")) == ["n3.json", "n4.json", "n5.json"]
    clock.pass_hours(2)
    store.put("n5", hours=24, by="controller", why="failed")
    assert sorted(path.name for path in store.path.glob("*.json")) == ["n4.json", "n5.json"]


def test_the_best_proven_come_first(store, clock):
    store.put("n1", hours=24, by="ann", why="by hand")
    clock.pass_hours(1)
    store.put("n2", hours=24, by="controller", why="twice", evidence=[failure(1), failure(2)])
    store.put("n3", hours=24, by="bob", why="by hand, later")
    assert names(store) == ["n2", "n3", "n1"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"node": "n7"}',
        json.dumps({"node": "../n7", "since": "x", "until": "x", "by": "x", "why": "x"}),
        json.dumps({"node": "n7", "since": "2026-01-01", "until": "tomorrow", "by": "x", "why": "x"}),
        json.dumps({"node": "n7", "since": "2026-01-01", "until": "2999-01-01", "by": "x", "why": "", "evidence": [1]}),
    ],
)
def test_a_damaged_file_is_reported_and_ends_nothing(store, clock, content):
    store.put("n3", hours=24, by="controller", why="failed")
    (store.path / "n7.json").write_text(content)
    found, (wrong,) = store.read()
    assert [entry.node for entry in found] == ["n3"]
    assert "n7.json cannot be read and is ignored" in wrong
    assert names(store) == ["n3"]
    store.put("n7", hours=24, by="controller", why="failed")
    assert set(names(store)) == {"n3", "n7"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "n3\n", "n" * 300])
def test_what_is_no_name_of_a_node(store, name):
    with pytest.raises(ValueError, match="no name of a node"):
        store.put(name, hours=1, by="x", why="y")
    assert not store.lift(name)
    assert not store.path.exists()


def test_times_without_a_zone_are_utc():
    assert moment_of("2026-01-01T00:00:00") == moment_of("2026-01-01T00:00:00+00:00")
    assert moment_of("2026-01-01T01:00:00+01:00") == moment_of("2026-01-01")
