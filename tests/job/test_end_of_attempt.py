"""The end of an attempt survives as the comment of a job."""

import re

import pytest

from megatron_qwen.job.end_of_attempt import EndOfAttempt
from megatron_qwen.resilience.policy import AttemptOutcome, Decision
from megatron_qwen.resilience.rules import Action, Reason

OUTCOME = AttemptOutcome(
    Reason.STORAGE, "No space left on device in /runs/a b=c \u00e9", ("n1",), "OSError at x.py:3", 44, 12, 40
)
DECISION = Decision(Action.REQUEUE, "storage: full", 1, ("n1", "n2"), 30.0)


def test_there_and_back():
    end = EndOfAttempt.of(7, OUTCOME, DECISION, exit_code=1)
    word = end.as_text()
    assert re.fullmatch(r"mq:[\w-]+", word), "scontrol prints it between other fields"
    assert EndOfAttempt.from_text(word) == end
    assert end.facts["detail"] == OUTCOME.detail
    assert (end.facts["iteration"], end.facts["iterations_gained"], end.facts["saved_iteration"]) == (44, 12, 40)


@pytest.mark.parametrize("comment", ["", "a person's words", "mq:", "mq:AAAA", "mq:\u00e9", "mq:eJyLNtQxijUEAAbKAb8"])
def test_other_comments(comment):
    assert EndOfAttempt.from_text(comment) is None
