"""Faults of a file system are told from other errors."""

import errno
import os

import pytest

from megatron_qwen.resilience.storage import fault_in, is_fault, names_fault, names_full


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ESHUTDOWN])
def test_a_fault(number):
    error = OSError(number, os.strerror(number), "/runs/a/metrics.jsonl")
    assert is_fault(error)
    assert names_fault(f"OSError: {error}")
    assert names_full(f"OSError: {error}") is (number in (errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "no such file"), PermissionError(errno.EACCES, "denied"), OSError("no number")],
)
def test_what_is_none(error):
    assert not is_fault(error)
    assert not names_fault(f"OSError: {error}")


def test_a_run_directory_that_is_gone_is_a_fault(tmp_path):
    """Its file system is not mounted any more."""
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert not is_fault(missing, tmp_path)
    assert is_fault(missing, tmp_path / "gone")
    assert not is_fault(PermissionError(errno.EACCES, "denied"), tmp_path / "gone")


def test_a_connection_that_timed_out_is_no_word_about_a_disk():
    assert not names_fault("RuntimeError: [gloo] Connection timed out with peer 3")
    assert is_fault(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))


def test_a_file_system_that_takes_a_file(tmp_path):
    assert fault_in(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert "No such file or directory in" in str(fault_in(tmp_path / "gone"))


def test_a_file_system_that_takes_none(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert fault_in(tmp_path) == f"No space left on device in {tmp_path}"
    assert list(tmp_path.iterdir()) == []
