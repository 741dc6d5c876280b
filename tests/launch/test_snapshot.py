"""The code of a run is the working tree at its submission."""

import json
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from launch.snapshot import freeze
from megatron_qwen.errors import ConfigError

SECRET = "0f-the-kind-that-nobody-should-see"


@pytest.fixture
def checkout(tmp_path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "code.py").write_text("one = 1\n")
    (root / "gone.py").write_text("")
    (root / ".gitignore").write_text("*.log\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", "-C", root, *command], check=True)
    return root


def test_changes_and_new_files_are_taken(checkout, tmp_path):
    (checkout / "code.py").write_text("one = 2\n")
    (checkout / "gone.py").unlink()
    (checkout / "new.py").write_text("new = 3\n")
    (checkout / "ignored.log").write_text("")
    (checkout / "link").symlink_to("/etc/passwd")
    snapshot = freeze(tmp_path / "code", environ={}, root=checkout)
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == [
        ".gitignore", "code.py", "new.py", "snapshot.json", "uncommitted.diff",
    ]  # fmt: skip
    assert (tmp_path / "code/code.py").read_text() == "one = 2\n"
    assert "+one = 2" in (tmp_path / "code/uncommitted.diff").read_text()
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    note = json.loads((tmp_path / "code/snapshot.json").read_text())
    assert note["commit"] == snapshot.commit == head.stdout.strip()
    assert note["new"] == ["new.py"]
    assert snapshot.modified


def test_an_untouched_checkout_is_not_modified(checkout, tmp_path):
    assert not freeze(tmp_path / "code", environ={}, root=checkout).modified


def test_compiled_modules_are_taken_and_used_while_they_are_those_of_the_source(checkout, tmp_path):
    (checkout / ".gitignore").write_text("__pycache__\n")
    for name in ("code.py", "gone.py"):
        py_compile.compile(str(checkout / name))
    (checkout / "gone.py").write_text("changed = 1\n")
    freeze(tmp_path / "code", environ={}, root=checkout)
    command = [sys.executable, "-v", "-c", "import code, gone; print(gone.changed)"]
    environment = {"PYTHONPATH": str(tmp_path / "code"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    used = [line.split()[-1] for line in done.stderr.splitlines() if "matches" in line]
    assert str(tmp_path / "code/code.py") in used
    assert str(tmp_path / "code/gone.py") not in used
    assert done.stdout == "1\n"
    copied = [path.name.split(".")[0] for path in (tmp_path / "code/__pycache__").iterdir()]
    assert copied == ["code"], "what was compiled of another state may hold what the source no longer holds"


def test_private_files_stay_out(checkout, tmp_path):
    for name in (".env", "server.pem", "credentials"):
        (checkout / name).write_text("x")
    (checkout / "notes.txt").write_text(f"the key is {SECRET}")
    (checkout / "big.bin").write_bytes(bytes(2 << 20))
    snapshot = freeze(tmp_path / "code", environ={"MY_TOKEN": SECRET}, root=checkout)
    assert sorted(line.split(":")[0] for line in snapshot.left_out) == [
        ".env", "big.bin", "credentials", "notes.txt", "server.pem",
    ]  # fmt: skip
    assert SECRET not in "".join(path.read_text() for path in (tmp_path / "code").iterdir())


def test_a_secret_in_a_tracked_file_is_refused(checkout, tmp_path):
    (checkout / "code.py").write_text(f"key = '{SECRET}'\n")
    with pytest.raises(ConfigError, match=r"code.py: holds the value of \$MY_TOKEN"):
        freeze(tmp_path / "code", environ={"MY_TOKEN": SECRET}, root=checkout)
    assert not (tmp_path / "code").exists()


def test_without_git(checkout, tmp_path):
    subprocess.run(["rm", "-rf", checkout / ".git"], check=True)
    (checkout / "megatron_qwen").mkdir()
    (checkout / "megatron_qwen/a.py").write_text("")
    (checkout / "mq").write_text("")
    assert freeze(tmp_path / "code", environ={}, root=checkout).commit is None
    assert (tmp_path / "code/megatron_qwen/a.py").is_file()
    assert not (tmp_path / "code/code.py").exists(), "only what a job needs"
