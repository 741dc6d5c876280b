"""Peak dense matrix throughput of known devices, the denominator of MFU."""

# bf16 dense TFLOP/s without sparsity, from NVIDIA's data sheets of the SXM parts.
_BF16_TFLOPS = {"B200": 2250.0, "H200": 989.4, "H100": 989.4, "A100": 312.0}


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Peak in TFLOP/s of a device by its CUDA name, or None where it is not known.

    Args:
        device_name: for example ``NVIDIA H100 80GB HBM3``.
        dtype: the compute format; only bf16 has a table (fp32 runs say null).
    """
    if dtype != "bf16" or "PCIe" in device_name or "NVL" in device_name:
        return None
    return next((peak for name, peak in _BF16_TFLOPS.items() if name in device_name), None)
