"""The denominators of MFU are the dense bf16 figures of data sheets."""

import pytest

from megatron_qwen.estimate.hardware import peak_tflops

# NVIDIA's data sheets name H100 SXM and H200 SXM with 1,979 TFLOP/s in bf16 with sparsity, twice the dense rate; B200
# with 4,500 (both halves of GB200's 9,000 / 2); A100 with 312 dense.
SHEETS = {
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA B200": 4500 / 2,
    "NVIDIA A100-SXM4-80GB": 312,
}


@pytest.mark.parametrize("name", SHEETS)
def test_dense_bf16(name):
    assert peak_tflops(name, "bf16") == pytest.approx(SHEETS[name], rel=2e-4)
    assert peak_tflops(name, "fp32") is None


@pytest.mark.parametrize("name", ["CPU", "NVIDIA L4", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"])
def test_other_devices_have_no_peak(name):
    assert peak_tflops(name, "bf16") is None
