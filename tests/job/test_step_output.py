"""A step of a job that takes too long is ended with its srun, and what it has said by then is kept."""

import os
import sys

from megatron_qwen.job import step_output
from megatron_qwen.job.step_output import output_of

# As srun does, it ends its step when it is told to.
SLOW = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, {handler})
print("counters n1: oom_kill=1", flush=True)
print("waiting", file=sys.stderr, flush=True)
time.sleep(60)
"""


def run(code, *arguments, timeout_s=60.0):
    return output_of([sys.executable, "-c", code, *map(str, arguments)], environment=os.environ, timeout_s=timeout_s)


def test_what_a_step_prints():
    found = run("import sys; print('counters n1:'); print('\\udcff', file=sys.stderr); sys.exit(3)")
    assert (found.stdout, found.code) == ("counters n1:\n", 3)
    assert "udcff" in found.stderr


def test_a_slow_step_is_told_to_end(tmp_path):
    found = run(SLOW.format(handler="end"), tmp_path / "ended", timeout_s=3)
    assert (found.stdout, found.stderr, found.code) == ("counters n1: oom_kill=1\n", "waiting\n", None)
    assert (tmp_path / "ended").exists()


def test_one_that_does_not_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(step_output, "_END_S", 0.2)
    found = run(SLOW.format(handler="signal.SIG_IGN"), tmp_path / "ended", timeout_s=3)
    assert (found.stdout, found.code) == ("counters n1: oom_kill=1\n", None)
    assert not (tmp_path / "ended").exists()
