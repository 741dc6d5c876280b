"""On a GPU with FP8: the check of an installation passes, by Transformer Engine and by torch's own FP8 GEMM."""

import sys

import pytest
import torch

from launch.fp8_proof import prove
from megatron_qwen.models.fp8_check import problems, scaled_gemms
from megatron_qwen.models.te_backend import provider as te_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
GPU = torch.device("cuda")


def needs_fp8() -> None:
    if reason := te_backend.why_not_fp8("tensorwise"):
        pytest.skip(reason)


def test_torchs_own_fp8_gemm():
    needs_fp8()
    used, found = problems(scaled_gemms, GPU)
    assert found == []
    assert used < 1


def test_transformer_engine():
    needs_fp8()
    if reason := te_backend.why_not():
        pytest.skip(f"Transformer Engine cannot run here: {reason}")
    used, found = problems(te_backend.fp8_gemms, GPU)
    assert found == []
    assert used < 1


def test_a_wrong_scale_is_found():
    needs_fp8()

    def doubled(x, weight, gradient):
        y, *others = scaled_gemms(x, weight, gradient)
        return (2 * y, *others)

    assert len(problems(doubled, GPU)[1]) == 1


def test_the_process_that_doctor_starts():
    proof = prove(sys.executable)
    assert proof.state in ("ok", "not tried"), proof
