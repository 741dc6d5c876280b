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


# Memory of the same parts, in GiB as a process sees it (nvidia-smi), rounded down.
_MEMORY_GIB = {"B200": 178.0, "H200": 139.0, "H100": 79.0, "A100": 79.0}


def device_memory_gib(device_name: str) -> float | None:
    """Memory of a device by its name, or None where it is not known. An A100 is taken for the one with 80 GB."""
    return next((size for name, size in _MEMORY_GIB.items() if name in device_name), None)
