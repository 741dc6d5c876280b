"""What a process computes on, as the rest of the tree asks for it."""

import os
import subprocess
import sys

import torch

from megatron_qwen import device
from tests.conftest import environment

PEAK = """
from megatron_qwen import device
before = device.peak_memory_bytes()
block = b"x" * 2**29
del block
grown = device.peak_memory_bytes() - before
assert abs(grown - 2**29) < 2**26, grown
assert before < 2**30, before
"""
# A launcher that once held 1 GiB starts a rank.
LAUNCHER = f"""
import subprocess, sys
block = b"x" * 2**30
subprocess.run([sys.executable, "-c", {PEAK!r}], check=True)
"""


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    assert (device.backend(), device.count(), device.compute_capability()) == ("gloo", 0, (0, 0))
    assert device.current() == torch.device("cpu")
    assert device.total_memory_gib() is None
    assert device.peak_memory_bytes() > 1 << 20
    device.select(3, local_world_size=4)
    device.synchronize()


def test_random_state_there_and_back(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    state = device.rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def test_tokens_of_a_loss_chunk_fill_64_mib(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    assert [device.loss_chunk_tokens(row_bytes) for row_bytes in (1 << 10, 1 << 15, 1 << 30)] == [4096, 2048, 128]
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    assert device.loss_chunk_tokens(1 << 30) == 4096


def test_ranks_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert device.fair_threads(1) == cores
    assert device.fair_threads(10 * cores) == 1


def test_peak_memory_is_in_bytes_and_of_this_process_alone(own_interpreters):
    """On Linux a program inherits the peak that getrusage reports from the process that started it."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", LAUNCHER], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
