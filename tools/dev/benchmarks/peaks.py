"""``mq bench peaks``: the peak rates of GEMMs, attention and memory on this machine, against its data sheet."""

import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from megatron_qwen import device
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.hardware import GemmRate, Hardware, known, peak_tflops
from megatron_qwen.estimate.hardware_file import write_hardware
from tools.dev.benchmarks.collectives import speeds_of_links
from tools.dev.benchmarks.rows import BenchmarkRow

# [tokens, in, out] of Qwen2.5's layers at 4,096 tokens, and the cube that others quote.
_GPU_GEMMS = {
    "8192 cube": (8192, 8192, 8192),
    "7B qkv": (4096, 3584, 4608),
    "7B proj": (4096, 3584, 3584),
    "7B fc1": (4096, 3584, 37_888),
    "7B fc2": (4096, 18_944, 3584),
    "7B output": (4096, 3584, 152_064),
    "72B fc1 at TP 8": (4096, 8192, 7392),
    "72B fc2 at TP 8": (4096, 3696, 8192),
    "1.5B fc1": (8192, 1536, 17_920),
    "1.5B fc2": (8192, 8960, 1536),
    "0.5B fc1": (16_384, 896, 9728),
    "0.5B fc2": (16_384, 4864, 896),
    "expert of 57B fc1": (4096, 3584, 5120),
    "expert of 30B fc1": (1024, 2048, 1536),
}
_CPU_GEMMS = {
    "1024 cube": (1024, 1024, 1024),
    "demo fc1": (2048, 192, 1024),
    "demo fc2": (2048, 512, 192),
    "384 fc1": (2048, 384, 2048),
    "384 proj": (2048, 384, 384),
    "0.5B fc1": (512, 896, 9728),
    "0.5B fc2": (512, 4864, 896),
    "0.5B output": (128, 896, 32_000),
}
# [heads, KV heads, head dimension] and length.
_ATTENTION = {"7B 4096": (28, 4, 128, 4096), "7B 32768": (28, 4, 128, 32_768), "0.5B 4096": (14, 2, 64, 4096)}
_CPU_ATTENTION = {"0.5B 1024": (14, 2, 64, 1024)}
_COPY = "copy in memory, read and written"
_COPY_BYTES = {True: 8 << 30, False: 1 << 28}


def run(*, rounds: int, hardware: Path | None = None) -> list[BenchmarkRow]:
    """Rows of TFLOP/s and GB/s; without a data sheet a figure is compared with itself.

    Args:
        rounds: timings of each, of which the median counts.
        hardware: also writes what was measured to this file, for ``mq plan --gpu FILE``.
    """
    kind = known(device.device_name())
    if hardware is not None and device.has_cuda() and kind is None:
        fix = "has links of unknown speed; write the file by hand, as docs/performance.md describes."
        raise ConfigError(Problem("--hardware", device.device_name(), fix))
    rows = list(_rows(rounds))
    if hardware is not None:
        write_hardware(hardware, _hardware(rows, rounds))
    return rows


def _hardware(rows: Sequence[BenchmarkRow], rounds: int) -> Hardware:
    """The rows as the peak rates of a device.

    Links of a single GPU cannot be measured: their rates and the host's speed are those of its kind in
    estimate/hardware.py. On a CPU two ranks measure them.
    """
    gpu = device.has_cuda()
    speeds = {row.benchmark: row.ours for row in rows}
    memory_gb_s = speeds[_COPY]
    gemms = _GPU_GEMMS if gpu else _CPU_GEMMS
    kind = known(device.device_name())
    directions = [
        statistics.median(speeds[f"attention {way}, {name}"] for name in (_ATTENTION if gpu else _CPU_ATTENTION))
        for way in ("forward", "backward")
    ]
    link = speeds_of_links(rounds)["send and receive"]["64 MiB"] if kind is None else 0.0
    rest = "the peak is what was reached" if kind is None else "links and host from the data sheet of its kind"
    bf16 = _fit({gemms[name]: speeds[f"bf16 GEMM, {name}"] for name in gemms}, memory_gb_s, 2.0)
    fp8 = None
    if gpu:
        fp8 = _fit({gemms[name]: speeds[f"fp8 GEMM, {name}"] for name in gemms}, memory_gb_s, 1.0)
    return Hardware(
        name=kind.name if kind is not None else "cpu",
        memory_gib=device.total_memory_gib() or psutil.virtual_memory().total / 2**30,
        peak_tflops=kind.peak_tflops if kind is not None else max(speeds[f"bf16 GEMM, {name}"] for name in gemms),
        bf16=bf16,
        fp8=fp8,
        attention_tflops=(directions[0], directions[1]),
        memory_gb_s=memory_gb_s,
        nvlink_gb_s=kind.nvlink_gb_s if kind is not None else link,
        network_gb_s=kind.network_gb_s if kind is not None else link,
        devices_per_node=kind.devices_per_node if kind is not None else 1,
        host_us_per_layer=kind.host_us_per_layer if kind is not None else 0.0,
        host_us_per_expert=kind.host_us_per_expert if kind is not None else 0.0,
        source=f"mq bench peaks on {device.device_name()}, {datetime.date.today().isoformat()}; {rest}",
    )


def _fit(tflops: dict[tuple[int, int, int], float], memory_gb_s: float, element_bytes: float) -> GemmRate:
    """Rate, exposed fraction of memory accesses and launch time, all >= 0, by least squares of relative errors."""
    from scipy.optimize import nnls

    matrix, ones = [], []
    for (m, k, n), speed in tflops.items():
        flops = 2.0 * m * n * k
        seconds = flops / (speed * 1e12)
        moved = element_bytes * (m * k + k * n) + 2.0 * m * n
        matrix.append([flops / 1e12 / seconds, moved / (memory_gb_s * 1e9) / seconds, 1e-6 / seconds])
        ones.append(1.0)
    (per_tflop, exposed, launch_us), _ = nnls(matrix, ones)
    return GemmRate(float(1.0 / max(per_tflop, 1e-9)), float(exposed), float(launch_us), element_bytes)


def _rows(rounds: int) -> Iterator[BenchmarkRow]:
    place, gpu = device.current(), device.has_cuda()
    peak = peak_tflops(device.device_name(), "bf16")
    for name, (tokens, inner, outer) in (_GPU_GEMMS if gpu else _CPU_GEMMS).items():
        flops = 2.0 * tokens * inner * outer
        x = torch.randn(tokens, inner, device=place, dtype=torch.bfloat16)
        w = torch.randn(outer, inner, device=place, dtype=torch.bfloat16)
        yield _row(f"bf16 GEMM, {name}", flops, _times(partial(F.linear, x, w), rounds), peak)
        if gpu:
            yield _row(f"fp8 GEMM, {name}", flops, _times(_fp8_gemm(x, w), rounds), 2 * peak if peak else None)
    if not gpu:
        x = torch.randn(1024, 1024)
        yield _row("fp32 GEMM, 1024 cube", 2.0 * 1024**3, _times(lambda: x @ x, rounds), None)
    for name, shape in (_ATTENTION if gpu else _CPU_ATTENTION).items():
        yield from _attention(name, shape, rounds, peak)
    source = torch.empty(_COPY_BYTES[gpu], dtype=torch.uint8, device=place).random_()
    target = torch.empty_like(source)
    seconds = _times(lambda: target.copy_(source), rounds)
    yield _row(_COPY, 2.0 * source.numel() * 1e3, seconds, None, unit="GB/s")


def _fp8_gemm(x: torch.Tensor, w: torch.Tensor) -> Callable[[], torch.Tensor]:
    one = torch.ones((), device=x.device)
    x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    return lambda: torch._scaled_mm(x8, w8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _attention(name: str, shape: tuple[int, int, int, int], rounds: int, peak: float | None) -> Iterator[BenchmarkRow]:
    """Causal attention by torch's SDPA; half of the square is counted."""
    heads, groups, width, length = shape
    place = device.current()

    def draw(count: int) -> torch.Tensor:
        return torch.randn(1, count, length, width, device=place, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = draw(heads), draw(groups), draw(groups)
    gradient = torch.randn(1, heads, length, width, device=place, dtype=torch.bfloat16)
    flops = 2.0 * heads * width * length**2

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    yield _row(f"attention forward, {name}", flops, _times(forward, rounds), peak)
    out = forward()
    backward = _times(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), rounds)
    yield _row(f"attention backward, {name}", 2.5 * flops, backward, peak)


def _times(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of one call, in rounds of several calls that last long enough to be timed."""
    work()
    device.synchronize()
    started = time.perf_counter()
    work()
    device.synchronize()
    calls = max(1, min(200, round(0.02 / max(time.perf_counter() - started, 1e-6))))
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        device.synchronize()
        seconds.append((time.perf_counter() - started) / calls)
    return seconds


def _row(name: str, work: float, seconds: list[float], peak: float | None, *, unit: str = "TFLOP/s") -> BenchmarkRow:
    speeds = sorted(work / second / 1e12 for second in seconds)
    middle = statistics.median(speeds)
    limit = peak or middle
    return BenchmarkRow(
        benchmark=name,
        ours=middle,
        against=limit,
        unit=unit,
        peer="data sheet" if peak else "itself",
        ratio=middle / limit,
        ratio_min=speeds[0] / limit,
        ratio_max=speeds[-1] / limit,
        required=0.0,
        conditions=f"{device.device_name()}, {len(seconds)} rounds",
    )
