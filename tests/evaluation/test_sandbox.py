"""Programs that a model may write do no harm, and pass only if their tests have run."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_qwen.errors import UserError
from megatron_qwen.evaluation import sandbox
from megatron_qwen.evaluation.code_answers import humaneval, mbpp, passed
from megatron_qwen.evaluation.sandbox import SandboxLimits, run_program, run_programs, unavailable

LIMITS, SHORT = SandboxLimits(seconds=3), SandboxLimits(seconds=1)
FORKS = """
import os, time
made = 0
try:
    while made < 200:
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        made += 1
except BlockingIOError:
    pass
assert made < 40
"""


@pytest.fixture(scope="module", autouse=True)
def _possible():
    if (reason := unavailable()) is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import math, re, heapq, collections; assert math.gcd(4, 6) == 2",
        "import tempfile\nwith tempfile.TemporaryFile() as file:\n    file.write(b'x' * 1000)",
        "import subprocess; assert subprocess.run(['true']).returncode == 0",
        "import sys; print('x' * 100000); print('y', file=sys.stderr)",
        "import os; assert os.getuid() != 0",
        FORKS,
    ],
)
def test_what_passes(program):
    assert run_program(program, LIMITS) == sandbox.Outcome(True)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("def f(", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended before its end, with exit code 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended before its end"),
        ("while True: pass", "took longer than 1 s"),
        ("import time; time.sleep(60)", "took longer than 1 s"),
        ("import os\nif os.fork() == 0:\n    os.setsid()\nimport time; time.sleep(60)", "took longer than 1 s"),
        ("x = bytearray(2**31)", "MemoryError"),
        ("open('/tmp/a', 'wb').write(b'x' * 2**25)", "OSError: [Errno 27]"),
        ("for i in range(9): open(f'/tmp/{i}', 'wb').write(b'x' * 2**23)", "OSError: [Errno 28]"),
        ("import os\nwhile True: os.fork()", "BlockingIOError"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), 2)", "ConnectionRefusedError"),
        ("import socket; socket.create_connection(('192.0.2.1', 80), 2)", "Network is unreachable"),
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("open('/usr/lib/new', 'w')", "OSError: [Errno 30]"),
        ("import os; os.setuid(0)", "PermissionError"),
        ("open('/dev/shm/a', 'w')", "OSError: [Errno 30]"),
        ("open('/a', 'w')", "Error: [Errno"),
        ("import torch", "ModuleNotFoundError"),
    ],
)
def test_what_does_not(program, why):
    found = run_program(program, SHORT if "longer" in why else LIMITS)
    assert not found.passed
    assert why in found.why


def test_it_sees_neither_the_environment_nor_the_files_of_whoever_runs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    (tmp_path / "file").write_text("kept")
    program = f"import os\nassert 'A_SECRET' not in os.environ\nassert not os.path.exists({str(tmp_path)!r})"
    assert run_program(program, LIMITS).passed
    assert run_program(
        "import os; assert os.listdir('/home' if os.path.exists('/home') else '/tmp') == []", LIMITS
    ).passed
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_left_running():
    mark = "987654.321"
    program = f"import subprocess\nfor _ in range(3): subprocess.Popen(['sleep', '{mark}'])\nwhile True: pass"
    assert not run_program(program, SHORT).passed
    until = time.monotonic() + 10
    while (left := _sleeping(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


def _sleeping(mark):
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line == f"sleep {mark}"]


def test_as_an_ordinary_user():
    """The user namespaces of an ordinary user work as well, with the limit of processes."""
    if os.geteuid() or shutil.which("setpriv") is None:
        pytest.skip("takes root to become another user, and setpriv of util-linux")
    lines = f"import sys\nsys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})\nimport sandbox\n"
    lines += "limits = sandbox.SandboxLimits(seconds=3)\nprint(sandbox.unavailable())\n"
    unshare = "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000), 'a namespace of its own'"
    for program in ("assert True", "import os\nwhile True: os.fork()", "open('/dev/shm/a', 'w')", unshare):
        lines += f"print(sandbox.run_program({program!r}, limits))\n"
    # Another interpreter: an ordinary user may not read root's.
    words = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "/usr/bin/python3", "-c", lines]
    if not Path("/usr/bin/python3").exists():
        pytest.skip("/usr/bin/python3 is not there, and an ordinary user may not read root's interpreter")
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", check=False)
    if "None" not in done.stdout:
        pytest.skip(f"this kernel gives ordinary users no namespaces: {done.stdout}{done.stderr[-300:]}")
    _, one, two, three, four = done.stdout.splitlines()
    assert "passed=True" in one
    assert "BlockingIOError" in two
    assert "Errno 30" in three
    assert "passed=True" in four, four


def test_a_root_without_user_ids_to_give_is_no_root():
    """Of a container with a user namespace: the sandbox of ordinary users is taken, or there is none and it says so."""
    if shutil.which("unshare") is None:
        pytest.skip("takes unshare of util-linux")
    lines = f"import sys\nsys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})\nimport sandbox\n"
    lines += "reason = sandbox.unavailable()\n"
    lines += "print(reason or sandbox.run_program('assert True', sandbox.SandboxLimits()))\n"
    words = ["unshare", "--user", "--map-root-user", sys.executable, "-c", lines]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", check=False)
    if done.returncode:
        pytest.skip(f"this kernel gives no user namespace: {done.stderr[-200:]}")
    assert "passed=True" in done.stdout or "no sandbox can be made here" in done.stdout, done.stdout


def test_programs_of_the_two_kinds():
    function = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one"}
    found = humaneval([["    return 1", "    return 2"], ["    return 1"]], [function, function])
    assert [[one for one, _ in samples] for samples in found] == [[True, False], [True]]
    assert passed(function, [found[0]]) == {"pass@1": 0.5}
    program = {"test_list": ["assert two() == 2"], "test_setup_code": ""}
    found = mbpp([["def two(): return 2"], ["import sys; sys.exit()"]], [program, program])
    assert [one for ((one, _),) in found] == [True, False]


def test_a_sandbox_that_fails_in_the_middle_is_tried_once_more(monkeypatch):
    """No memory for a process, say: one failure is the machine's, two are one clear message and no score."""
    real, tried = sandbox._walls, []

    def fails(times):
        def walls(*more):
            tried.append(1)
            return [*real(*more), "--no-such-option"] if len(tried) <= times else real(*more)

        return walls

    assert unavailable() is None
    monkeypatch.setattr(sandbox, "_AGAIN_S", 0.01)
    monkeypatch.setattr(sandbox, "_walls", fails(1))
    assert run_program("pass", SHORT).passed
    monkeypatch.setattr(sandbox, "_walls", fails(100))
    with pytest.raises(UserError, match=r"cannot be run: bubblewrap: .*no-such-option.* repeat the command"):
        mbpp([["pass"]], [{"test_list": [], "test_setup_code": ""}])


def test_many_at_once():
    programs = [f"assert {number} % 2 == 0" for number in range(24)]
    assert [one.passed for one in run_programs(programs, LIMITS)] == [number % 2 == 0 for number in range(24)]


def test_the_interpreter_is_the_one_that_runs_this():
    assert run_program(f"import sys; assert sys.version_info[:2] == {sys.version_info[:2]}", LIMITS).passed
