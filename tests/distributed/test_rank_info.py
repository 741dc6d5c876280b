"""Who a process is, from torchrun's variables, from srun's, or alone."""

import pytest

from megatron_qwen.distributed.rank import RankInfo, under_srun
from megatron_qwen.errors import ConfigError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n0", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_ID": "77", "MASTER_ADDR": "10.0.0.1",
}  # fmt: skip


def test_alone():
    assert RankInfo.from_environment({}) == RankInfo(0, 1, 0, 1, "127.0.0.1", 0)


def test_torchrun():
    assert RankInfo.from_environment(TORCHRUN) == RankInfo(5, 8, 1, 4, "n0", 29500)
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        RankInfo.from_environment({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"})


def test_srun():
    info = RankInfo.from_environment(SRUN)
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (5, 7, 1, 3)
    assert info.master_address == "10.0.0.1"
    again = RankInfo.from_environment({**SRUN, "SLURM_RESTART_COUNT": "1"})
    assert again.master_port != info.master_port, "a restarted job must not meet the old one's port"
    even = RankInfo.from_environment({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"})
    assert even.local_world_size == 4


def test_a_batch_script_is_no_rank():
    assert not under_srun({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert under_srun(SRUN)
