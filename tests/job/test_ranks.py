"""What srun says of its tasks, and what ranks are told."""

import signal

from megatron_qwen.job.ranks import TaskEnd, environment_of_ranks, parse_task_ends, placement
from megatron_qwen.slurm import fields, gpus_of, hostnames, is_lost, is_usable, minutes, tasks_per_node

# As Slurm 22.05 printed it.
SAID = """srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=2.1
srun: error: n1: tasks 0,4-6: Exited with exit code 76
srun: error: n3: task 9: Segmentation fault (core dumped)
srun: Force Terminated StepId=2.1
"""


def test_tasks_that_ended_in_the_order_in_which_they_did():
    ends = parse_task_ends(SAID)
    assert ends[0] == TaskEnd(1, "n2", -signal.SIGKILL)
    assert ends[1:5] == [TaskEnd(rank, "n1", 76) for rank in (0, 4, 5, 6)]
    assert ends[5] == TaskEnd(9, "n3", -signal.SIGSEGV)
    assert parse_task_ends("") == []


def test_a_wrapper_reports_signals_as_codes():
    said = "srun: error: n1: task 0: Exited with exit code 137\nsrun: error: n1: task 1: Exited with exit code 93\n"
    assert parse_task_ends(said) == [TaskEnd(0, "n1", -signal.SIGKILL), TaskEnd(1, "n1", 93)]


def test_placement_of_unequal_nodes():
    assert tasks_per_node("2(x2),1") == [2, 2, 1]
    assert placement(["a", "b", "c"], [2, 2, 1]) == {0: "a", 1: "a", 2: "b", 3: "b", 4: "c"}


def test_what_ranks_are_told():
    own = {"PATH": "/bin", "RANK": "7", "WORLD_SIZE": "8", "SUBMITIT_FOLDER": "x", "SLURM_CPUS_PER_TASK": "12"}
    told = environment_of_ranks(own, address="10.0.0.1", port=4000, attempt=3)
    assert told == {
        "PATH": "/bin",
        "SLURM_CPUS_PER_TASK": "12",
        "SRUN_CPUS_PER_TASK": "12",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4000",
        "MQ_ATTEMPT": "3",
    }


def test_reading_scontrol():
    line = (
        "NodeName=n1 Arch=x86_64 OS=Linux 5.15 #1 SMP State=DOWN*+DRAIN Gres=gpu:h100:8(S:0-1),nic:2 "
        "Reason=bad card [root@2026]"
    )
    node = fields(line)
    assert node["OS"] == "Linux 5.15 #1 SMP"
    assert node["Reason"] == "bad card [root@2026]"
    assert gpus_of(node) == {"h100": 8}
    assert is_lost(node)
    assert not is_usable(node)
    draining = {"State": "MIXED+DRAIN"}
    assert not is_lost(draining)
    assert not is_usable(draining)


def test_node_lists():
    assert hostnames("n[1-3,07],m,gpu[08-10]x") == ["n1", "n2", "n3", "n07", "m", "gpu08x", "gpu09x", "gpu10x"]
    assert hostnames("r[1-2]c[1-2]") == ["r1c1", "r1c2", "r2c1", "r2c2"]
    assert hostnames("n1") == ["n1"]
    assert hostnames("") == []


def test_times():
    assert minutes("1-00:00:00") == 1440
    assert minutes("1:30:00") == 90
    assert minutes("45:30") == 45.5
    assert minutes("90") == 90
    assert minutes("2-12") == 60 * 60
    assert minutes("UNLIMITED") is None
