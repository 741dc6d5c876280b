"""slurm/counters.sh with devices and logs that say what a test wants, and what is made of it."""

import os
import subprocess
from pathlib import Path

from megatron_qwen.job.counters import added, noted, parse
from tests.conftest import ROOT

KERNEL = """[1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus.
[2.0] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.
[3.0] NVRM: Xid (PCI:0000:5e:00): 31, pid=9, name=python, Ch 00000008
[4.0] Memory cgroup out of memory: Killed process 123 (python) total-vm:1kB
[5.0] Out of memory: Killed process 124 (python)
"""


def count(place: Path, *, programs: dict[str, str]) -> str:
    for name, text in programs.items():
        path = place / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    environment = {
        "PATH": f"{place}/bin:{os.environ['PATH']}",
        "SLURMD_NODENAME": "n7",
        "MQ_SYS": str(place / "sys"),
        "MQ_CGROUP": str(place / "cgroup"),
    }
    script = ROOT / "slurm/counters.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def test_everything_that_is_counted(tmp_path):
    (tmp_path / "cgroup").write_text("0::/system.slice/slurmstepd.scope/job_12/step_3/user/task_0\n")
    job = tmp_path / "sys/fs/cgroup/system.slice/slurmstepd.scope/job_12"
    job.mkdir(parents=True)
    (job / "memory.events").write_text("low 0\nhigh 0\nmax 5\noom 2\noom_kill 2\n")
    for port, downed in (("1", "4\n"), ("2", "unreadable\n")):
        counters = tmp_path / f"sys/class/infiniband/mlx5_0/ports/{port}/counters"
        counters.mkdir(parents=True)
        (counters / "link_downed").write_text(downed)
    (tmp_path / "kernel").write_text(KERNEL)
    gpus = "echo '0, 0, 0'; echo '1, 3, [N/A]'"
    said = count(tmp_path, programs={"dmesg": f"cat {tmp_path}/kernel", "nvidia-smi": gpus})
    assert parse(said) == {
        "n7": {
            "oom_kill": 2,
            "kernel_oom": 2,
            "xid_31": 1,
            "xid_79": 2,
            "gpu0_ecc_uncorrected": 0,
            "gpu0_remapped_rows": 0,
            "gpu1_ecc_uncorrected": 3,
            "mlx5_0/1_link_downed": 4,
        }
    }


def test_a_machine_that_says_nothing(tmp_path):
    assert count(tmp_path, programs={"dmesg": "exit 1", "nvidia-smi": "exit 9"}) == "counters n7:\n"


def test_what_was_added():
    before = parse(
        "counters n1: oom_kill=1 kernel_oom=0 xid_31=2\ncounters n2: mlx5_0/1_link_downed=4\ncounters n4: oom_kill=0\n"
    )
    after = parse(
        "0: counters n1: oom_kill=3 xid_31=9 xid_79=1 kernel_oom=1\n1: counters n2: mlx5_0/1_link_downed=6\n"
        "2: counters n3: oom_kill=9\n3: counters n4: oom_kill=0\n"
    )
    assert added(before, after) == {
        "n1": ("out-of-memory kill in the kernel log", "out-of-memory kill in the job's cgroup 2 times", "Xid 79"),
        "n2": ("mlx5_0/1_link_downed +2",),
    }
    assert added({}, after) == {}
    unread = {"n1": {"oom_kill": 3}}
    assert added(unread, after) == {}, "what could not be read before may have been there before"
    assert added(after, before) == {}, "a node that was started again counts from zero"


def test_the_output_of_a_health_check(tmp_path):
    log = tmp_path / "health.log"
    assert noted(log) == {}
    log.write_text("healthcheck n1: ok\ncounters n1: oom_kill=1\nhealthcheck n2: FAIL x\n")
    assert noted(log) == {"n1": {"oom_kill": 1}}
