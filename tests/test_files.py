"""Files are whole or absent whatever happens to a writer, and a lock keeps other processes out."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from megatron_qwen import files
from megatron_qwen.files import (
    LockHeldError,
    atomic_open,
    atomic_path,
    atomic_write,
    atomic_write_json,
    exclusive_lock,
    is_temporary,
    publish,
    sync_tree,
    temporary_name,
)
from tests.conftest import ROOT, small_disk


def python(code: str, *arguments: object, **options) -> subprocess.Popen[str]:
    """A process of its own that has imported everything of files.py."""
    command = [
        sys.executable,
        "-c",
        f"import os, sys\nfrom pathlib import Path\nfrom megatron_qwen.files import *\n{code}",
    ]
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def said(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    return process.stdout.readline().strip() or pytest.fail(process.stderr.read())


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_bytes_and_json(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    atomic_write(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    atomic_write_json(path, {"a": [1, None]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    atomic_write_json(path, {"a": 1}, indent=None)
    assert path.read_text() == '{"a": 1}\n'
    assert entries(tmp_path) == ["file"]


def test_a_stream_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_open(path) as stream:
        stream.write(b"new ")
        stream.flush()
        assert path.read_text() == "old"
        stream.write(b"content")
    assert path.read_text() == "new content"


@pytest.mark.parametrize("way", [atomic_open, atomic_path])
def test_a_writer_that_fails_leaves_what_was_there(way, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with way(path) as target:
            (target.write_bytes if way is atomic_path else target.write)(b"half of the new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["file"]


def test_what_cannot_be_json_is_not_written(tmp_path):
    atomic_write(tmp_path / "file", "old")
    with pytest.raises(TypeError):
        atomic_write_json(tmp_path / "file", {"a": object()})
    assert (tmp_path / "file").read_text() == "old"


def test_kill_in_the_middle_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    code = """
with atomic_open(Path(sys.argv[1])) as stream:
    stream.write(bytes(1 << 20))
    stream.flush()
    print("half", flush=True)
    sys.stdin.read()
"""
    process = python(code, path, stdin=subprocess.PIPE)
    assert said(process) == "half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "old"
    left = [path for path in tmp_path.iterdir() if is_temporary(path)]
    assert len(left) == 1  # which is told from files of other names
    assert left[0].stat().st_size == 1 << 20
    assert not any(map(is_temporary, (path, tmp_path / ".hidden.tmp", tmp_path / ".iter_0000001.attempt_1.tmp")))
    atomic_write(path, "new")
    assert path.read_text() == "new"


def test_kills_at_any_moment(tmp_path):
    """A reader never sees anything but one whole content."""
    path = tmp_path / "file"
    path.write_text(json.dumps([0] * 50_000))
    code = """
print("begun", flush=True)
number = 0
while True:
    number += 1
    atomic_write_json(Path(sys.argv[1]), [number] * 50_000, indent=None)
"""
    for pause in (0.0, 0.01, 0.02, 0.05):
        process = python(code, path)
        said(process)
        time.sleep(pause)
        process.kill()
        process.wait()
        content = json.loads(path.read_text())
        assert len(content) == 50_000
        assert len(set(content)) == 1


def test_two_writers_at_once(tmp_path):
    path, contents = tmp_path / "file", {letter * 100_000 for letter in "ab"}

    def write(content: str) -> None:
        for _ in range(50):
            atomic_write(path, content)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_text() in contents
    for thread in threads:
        thread.join()
    assert entries(tmp_path) == ["file"]
    assert len({temporary_name(path) for _ in range(100)}) == 100


def test_the_mode_is_kept(tmp_path):
    path = tmp_path / "file"
    old = os.umask(0o027)
    try:
        atomic_write(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o444, 0o666):
            path.chmod(mode)
            atomic_write(path, "private")
            assert stat.S_IMODE(path.stat().st_mode) == mode
            with atomic_path(path) as temporary:
                assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(old)


def test_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        path = disk / "file"
        atomic_write(path, "old")
        with pytest.raises(OSError, match="No space left") as caught:
            atomic_write(path, bytes(2 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
        assert path.read_text() == "old"
        assert entries(disk) == ["file"]


def test_a_directory_that_may_not_be_written():
    code = """
if os.geteuid() == 0:
    os.setuid(65534)
try:
    atomic_write(Path(sys.argv[1]), "new")
except PermissionError as error:
    print(error.filename)
"""
    with tempfile.TemporaryDirectory() as name:  # pytest's own may be closed to other users
        path = Path(name) / "file"
        path.write_text("old")
        Path(name).chmod(0o555)
        assert said(python(code, path)) == str(path)
        assert path.read_text() == "old"
        assert entries(Path(name)) == ["file"]


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write(tmp_path / "none" / "file", "new")
    assert caught.value.filename == str(tmp_path / "none" / "file")


@pytest.fixture
def synced(monkeypatch):
    """What os.fsync was called for, in order, and the renames between."""
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        seen.append("rename")
        return replace(self, target)

    monkeypatch.setattr(files.os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return seen


def test_durable_syncs_the_file_then_the_directory(synced, tmp_path):
    atomic_write(tmp_path / "plain", "text")
    assert synced == ["rename"]
    synced.clear()
    for way in (lambda: atomic_write(tmp_path / "file", "text", durable=True), lambda: durable_path(tmp_path / "file")):
        way()
        content, renamed, directory = synced
        assert content.startswith(".file.")
        assert (renamed, directory) == ("rename", tmp_path.name)
        synced.clear()


def durable_path(path: Path) -> None:
    with atomic_path(path, durable=True) as temporary:
        temporary.write_text("text")


def test_a_directory_is_published_in_one_rename(synced, tmp_path):
    work, final = tmp_path / ".final.tmp", tmp_path / "final"
    (work / "inner").mkdir(parents=True)
    (work / "a").write_text("a")
    (work / "inner" / "b").write_text("b")
    sync_tree(work)
    assert sorted(synced) == sorted(["a", "b", "inner", work.name])
    assert synced.index("b") < synced.index("inner")
    synced.clear()
    publish(work, final, durable=True)
    assert synced == ["rename", tmp_path.name]
    assert (final / "inner" / "b").read_text() == "b"
    assert not work.exists()
    work.mkdir()
    with pytest.raises(OSError, match="not empty"):
        publish(work, final)
    assert (final / "a").read_text() == "a"


HOLD = """
with exclusive_lock(Path(sys.argv[1]), inherited=sys.argv[2] == "flock"):
    print("held", flush=True)
    sys.stdin.read()
print("let go", flush=True)
"""


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_lock_of_another_process(kind, tmp_path):
    path, inherited = tmp_path / "lock", kind == "flock"
    holder = python(HOLD, path, kind, stdin=subprocess.PIPE)
    assert said(holder) == "held"
    begun = time.monotonic()
    with pytest.raises(LockHeldError), exclusive_lock(path, timeout_s=0, inherited=inherited):
        pass
    assert time.monotonic() - begun < 0.2
    with pytest.raises(LockHeldError), exclusive_lock(path, timeout_s=0.3, inherited=inherited):
        pass
    assert 0.3 < time.monotonic() - begun < 2
    threading.Timer(0.2, holder.stdin.close).start()
    with exclusive_lock(path, inherited=inherited):  # for as long as it takes
        assert said(holder) == "let go"
    holder.wait()


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_killed_holder_lets_go(kind, tmp_path):
    holder = python(HOLD, tmp_path / "lock", kind, stdin=subprocess.PIPE)
    assert said(holder) == "held"
    holder.kill()
    with exclusive_lock(tmp_path / "lock", timeout_s=5, inherited=kind == "flock"):
        pass
    holder.wait()


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_what_a_forked_process_holds(kind, tmp_path):
    """Of a dead parent: flock still holds, lockf does not."""
    code = """
with exclusive_lock(Path(sys.argv[1]), inherited=sys.argv[2] == "flock"):
    child = os.fork()
    if not child:
        sys.stdin.read()
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "lock"
    parent = python(code, path, kind, stdin=subprocess.PIPE)
    child = int(said(parent))
    assert parent.wait() == -signal.SIGKILL
    try:
        if kind == "flock":
            with pytest.raises(LockHeldError), exclusive_lock(path, timeout_s=0):
                pass
        else:
            with exclusive_lock(path, timeout_s=0, inherited=False):
                pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_process_does_not_hold_on_after_the_body(tmp_path):
    with exclusive_lock(tmp_path / "lock"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with exclusive_lock(tmp_path / "lock", timeout_s=0):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_file_that_its_holder_removed(tmp_path):
    """Whoever waited for the removed one and whoever makes a new one would else hold it together."""
    path = tmp_path / "lock"
    taken: list[str] = []

    def wait() -> None:
        with exclusive_lock(path, timeout_s=10):
            taken.append("second")
            with pytest.raises(LockHeldError), exclusive_lock(path, timeout_s=0):
                pass

    with exclusive_lock(path):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        path.unlink()
    waiting.join()
    assert taken == ["second"]


def test_a_directory_is_locked_and_renamed_by_its_holder(tmp_path):
    directory = tmp_path / "work"
    with pytest.raises(FileNotFoundError), exclusive_lock(directory, timeout_s=0, make=False):
        pass
    directory.mkdir()
    with exclusive_lock(directory, timeout_s=0, make=False):
        with pytest.raises(LockHeldError), exclusive_lock(directory, timeout_s=0, make=False):
            pass
        directory.rename(tmp_path / "done")
    assert entries(tmp_path) == ["done"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told: list[str] = []
    with exclusive_lock(tmp_path / "lock", timeout_s=0, without_locks=told.append):
        told.append("body")
    assert told == [f"{tmp_path} has no locks (No locks available)", "body"]
    with pytest.raises(OSError, match="no locks in this file system") as caught, exclusive_lock(tmp_path / "lock"):
        pass
    assert caught.value.filename == str(tmp_path / "lock")
