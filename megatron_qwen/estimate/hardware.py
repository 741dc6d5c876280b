"""Peak rates of a kind of device, as measured: the roofline from which step times are predicted.

H200: measured (benchmarks/results/h200_peaks.json, and h200_gpu_step.json for what Transformer Engine's attention
takes). H100: the same processor with memory measured at 3.0 TB/s. B200 and A100: the shares of the peak that the H200
reaches, on their data sheets' peaks: not measured. Links: data sheets, one direction, less a fifth for protocol.
"""

import re
from dataclasses import dataclass, replace
from typing import Annotated

from megatron_qwen.config.fields import Bounds
from megatron_qwen.errors import ConfigError, Problem

Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(minimum=0)]


@dataclass(frozen=True)
class GemmRate:
    """Time of a GEMM: FLOPs at a rate, plus the exposed part of its memory accesses and of its launch.

    Fitted to the fourteen GEMMs of h200_peaks.json; the largest error is 17 %.

    Args:
        tflops: asymptotic rate, TFLOP/s.
        exposed_traffic: fraction of the bytes of operands and result whose transfer is not overlapped with compute.
        launch_us: fixed time per GEMM, microseconds.
        element_bytes: bytes of an operand element.
    """

    tflops: Positive
    exposed_traffic: NotNegative
    launch_us: NotNegative
    element_bytes: Positive

    def seconds(self, m: float, n: float, k: float, *, memory_gb_s: float, result_bytes: float = 2.0) -> float:
        """Seconds of [m, k] x [k, n]; ``result_bytes`` are written per element of the result."""
        moved = self.element_bytes * (m * k + k * n) + result_bytes * m * n
        exposed = self.exposed_traffic * moved / (memory_gb_s * 1e9)
        return 2.0 * m * n * k / (self.tflops * 1e12) + exposed + self.launch_us * 1e-6


@dataclass(frozen=True)
class Hardware:
    """A kind of device and the links between them.

    Args:
        name: as ``--gpu`` says it.
        memory_gib: memory of a device that a process can use.
        peak_tflops: dense bf16, the denominator of MFU.
        bf16: GEMMs in bf16.
        fp8: GEMMs in FP8; None where the device has none.
        attention_tflops: TFLOP/s of causal attention, forward and backward, for long sequences and head dimension 128.
        memory_gb_s: bandwidth of a copy, bytes read plus bytes written.
        nvlink_gb_s: bandwidth of a device to the others of its node, one direction.
        network_gb_s: bandwidth of a device to other nodes, one direction.
        devices_per_node: devices connected by NVLink.
        host_us_per_layer: host time to launch the forward and backward kernels of a layer. From a step of a 0.5B with
            one sequence, which took 120 ms for 24 layers on a host that ran two such jobs.
        source: where the figures come from.
        host_us_per_expert: additional host time for each expert of a rank, whose GEMMs are launched one by one. From
            one step of four layers of Qwen3-30B-A3B with all 128 experts on a GPU, which was not profiled.
    """

    name: str
    memory_gib: Positive
    peak_tflops: Positive
    bf16: GemmRate
    fp8: GemmRate | None
    attention_tflops: tuple[Positive, Positive]
    memory_gb_s: Positive
    nvlink_gb_s: Positive
    network_gb_s: Positive
    devices_per_node: Annotated[int, Bounds(minimum=1)]
    host_us_per_layer: NotNegative
    source: str
    host_us_per_expert: NotNegative = 0.0  # files that were measured before this was a field have none


_BF16 = GemmRate(tflops=704.0, exposed_traffic=0.44, launch_us=9.0, element_bytes=2.0)
_FP8 = GemmRate(tflops=1510.0, exposed_traffic=0.66, launch_us=21.0, element_bytes=1.0)
_H200 = Hardware(
    name="h200",
    memory_gib=139.8,
    peak_tflops=989.4,
    bf16=_BF16,
    fp8=_FP8,
    attention_tflops=(525.0, 430.0),
    memory_gb_s=4300.0,
    nvlink_gb_s=360.0,
    network_gb_s=40.0,
    devices_per_node=8,
    host_us_per_layer=4000.0,
    host_us_per_expert=260.0,
    source="measured on one H200; links from data sheets (NVLink 450 GB/s, 400 Gb/s a GPU)",
)


def _like_h200(name: str, peak: float, memory_gib: float, memory_gb_s: float, nvlink_gb_s: float) -> Hardware:
    share = peak / _H200.peak_tflops
    return replace(
        _H200,
        name=name,
        memory_gib=memory_gib,
        peak_tflops=peak,
        bf16=replace(_BF16, tflops=_BF16.tflops * share),
        fp8=replace(_FP8, tflops=_FP8.tflops * share),
        attention_tflops=(_H200.attention_tflops[0] * share, _H200.attention_tflops[1] * share),
        memory_gb_s=memory_gb_s,
        nvlink_gb_s=nvlink_gb_s,
        source="the H200's shares of the peak on this device's data sheet; not measured",
    )


KINDS = {
    "h200": _H200,
    "h100": replace(
        _H200, name="h100", memory_gib=79.1, memory_gb_s=3000.0, source="the H200's processor, memory measured"
    ),
    "b200": _like_h200("b200", 2250.0, 178.0, 7000.0, 720.0),
    "a100": replace(_like_h200("a100", 312.0, 79.1, 1800.0, 240.0), fp8=None, network_gb_s=20.0),
}


def known(name: str) -> Hardware | None:
    """The kind of a device from its CUDA name, such as ``NVIDIA H100 80GB HBM3``; None where it is not known.

    PCIe and NVL variants have other clocks and memory than the SXM parts in ``KINDS``.
    """
    if "PCIe" in name or "NVL" in name:
        return None
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((device for kind, device in KINDS.items() if kind in words), None)


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """The denominator of MFU by a device's CUDA name; None where it is not known, and for formats other than bf16."""
    device = known(device_name)
    return device.peak_tflops if device is not None and dtype == "bf16" else None


def hardware(name: str) -> Hardware:
    """A kind by its name, in any case.

    Raises:
        ConfigError: it is not known.
    """
    if name.lower() not in KINDS:
        raise ConfigError(
            Problem(
                "--gpu",
                name,
                f"is not a known GPU; use one of {', '.join(sorted(KINDS))}, or a file of mq bench peaks.",
            )
        )
    return KINDS[name.lower()]
