"""Limits of control groups count, of both versions and of the groups above."""

import psutil
import pytest

from checkpoints_convert.memory import available_bytes

GIB = 1 << 30


def group(root, path, **files):
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def member(root, *lines):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    found = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def test_a_job_of_slurm(tmp_path):
    """The limit is on the job, two folders above the task; cache of files is free."""
    member(tmp_path, "0::/slurm/job_7/step_0/task_0")
    group(tmp_path, "slurm/job_7", memory__max=8 * GIB, memory__current=6 * GIB, memory__stat=f"inactive_file {GIB}")
    group(tmp_path, "slurm/job_7/step_0/task_0", memory__max="max", memory__current=GIB)
    assert available_bytes(tmp_path) == 3 * GIB
    group(tmp_path, "slurm/job_7", memory__current=16 * GIB)
    assert available_bytes(tmp_path) == 0


def test_a_container_whose_path_is_the_hosts(tmp_path):
    member(tmp_path, "0::/kubepods/pod/of-the-host")
    group(tmp_path, "", memory__max=4 * GIB, memory__current=GIB)
    assert available_bytes(tmp_path) == 3 * GIB


def test_version_1(tmp_path):
    member(tmp_path, "5:cpu,cpuacct:/a", "4:memory:/a")
    group(tmp_path, "memory/a", memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB)
    group(tmp_path, "memory", memory__limit_in_bytes=9_223_372_036_854_771_712, memory__usage_in_bytes=50 * GIB)
    assert available_bytes(tmp_path) == GIB


def test_no_limit(tmp_path):
    assert available_bytes(tmp_path) == 100 * GIB
    member(tmp_path, "0::/")
    assert available_bytes(tmp_path) == 100 * GIB
