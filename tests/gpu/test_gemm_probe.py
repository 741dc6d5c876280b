"""On a GPU: the probe of the comparison of ranks takes a plausible time, and little of it."""

import statistics
import time

import pytest
import torch

from megatron_qwen import device
from megatron_qwen.training.gemm_probe import GemmProbe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


def test_the_probe_repeats_itself():
    probe = GemmProbe(device.current())
    started = time.perf_counter()
    found = [probe.seconds() for _ in range(20)]
    assert statistics.median(found) > 1e-5  # 0.27 TFLOP: no GPU computes that in less
    assert max(found) < time.perf_counter() - started
