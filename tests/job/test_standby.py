"""When ranks that wait are used, and that they are ended otherwise. On real Slurm: tests/slurm/test_restart.py."""

import pytest

from megatron_qwen.job import standby
from megatron_qwen.job.standby import Standby
from megatron_qwen.resilience.standby import lay_out

ENVIRONMENT = {"MQ_ATTEMPT": "2", "MASTER_PORT": "15001"}
NODES = ("n1", "n2")


class Step:
    """Ranks of a job step, and what was asked of them."""

    def __init__(self, folder, code=None, answers=True):
        self.folder, self.code, self.answers = folder, code, answers
        self.asked = []

    def poll(self):
        return self.code

    def kill(self):
        self.asked.append("kill")

    def keep_log_in(self, logs):
        self.asked.append(logs)

    def send(self, number):
        self.asked.append(number.name)
        if self.answers:
            (self.folder / "begun").write_text("1")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "standby"
    lay_out(path)
    (path / "ready").write_text("1")
    return path


def waiting(folder, **step) -> Standby:
    return Standby(Step(folder, **step), "mq_standby_2", NODES, ENVIRONMENT, folder)


def test_ranks_that_are_ready_begin(folder, tmp_path):
    found = waiting(folder)
    assert found.begin(NODES, dict(ENVIRONMENT), tmp_path) is found.ranks
    assert found.ranks.asked == ["SIGUSR1", tmp_path]
    assert not folder.exists(), "a rank that the signal has not reached ends"


@pytest.mark.parametrize(
    ("nodes", "change", "ready", "code", "why"),
    [
        (("n1", "n3"), {}, True, None, "on other nodes"),
        (NODES, {"MQ_ATTEMPT": "3"}, True, None, "another environment"),
        (NODES, {"MASTER_PORT": "15002"}, True, None, "another environment"),
        (NODES, {}, False, None, "not ready"),
        (NODES, {}, True, 0, "have ended, with 0"),
        (NODES, {}, True, 137, "have ended, with 137"),
    ],
)
def test_others_are_ended(folder, tmp_path, caplog, nodes, change, ready, code, why):
    caplog.set_level("INFO")
    if not ready:
        lay_out(folder)
    found = waiting(folder, code=code)
    assert found.begin(nodes, ENVIRONMENT | change, tmp_path) is None
    assert found.ranks.asked == ["kill"]
    assert why in caplog.text
    assert folder.exists() is (code is not None), "the output of ranks that ended by themselves is kept"


def test_ranks_that_do_not_answer_are_ended(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(standby, "_ANSWER_S", 0.0)
    found = waiting(folder, answers=False)
    assert found.begin(NODES, ENVIRONMENT, tmp_path) is None
    assert found.ranks.asked == ["SIGUSR1", "kill"], "what srun says of their end is none of the attempt's"
