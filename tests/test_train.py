"""What a rank writes to its output: on a terminal little, in the file of a controller all of this project."""

import io
import logging

import pytest

from megatron_qwen import train
from megatron_qwen.resilience.rank_end import ATTEMPT_VARIABLE


@pytest.fixture
def fresh(monkeypatch):
    """Makes the root logger as a new process has it; it is put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("megatron_qwen")
    levels = root.level, ours.level
    # Called in the test, because pytest adds handlers of its own before it.
    yield lambda: monkeypatch.setattr(root, "handlers", [])
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.mark.parametrize(
    ("environ", "details"),
    [({}, False), ({"MQ_VERBOSE": "1"}, True), ({ATTEMPT_VARIABLE: "2"}, True), ({ATTEMPT_VARIABLE: ""}, False)],
)
def test_details_of_this_project_are_in_the_log_that_is_kept(environ, details, fresh):
    fresh()
    stream = io.StringIO()
    train.set_up_log(stream, environ)
    other = logging.getLogger("a_library.inside")
    other.setLevel(logging.DEBUG)
    logging.getLogger("megatron_qwen.training.start_log").debug("a choice")
    logging.getLogger("megatron_qwen.training.start_log").info("a line")
    logging.getLogger("megatron_qwenish").debug("of another project")
    other.debug("a detail of a library")
    other.info("a line of a library")
    texts = [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()]
    assert texts == [*(["a choice"] if details else []), "a line", "a line of a library"]
