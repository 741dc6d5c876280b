"""A rank of ``mq bench collectives``: times the collectives of training, and a copy in memory for comparison."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_qwen import device
from megatron_qwen.core_patches.install import prepare_process

SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "64 MiB": 1 << 26}


def main(rounds: int) -> dict[str, dict[str, list[float]]]:
    """GB/s by message, size and round: bytes that a rank must send at least, over the time; and a copy's."""
    prepare_process()
    import torch
    import torch.distributed as dist

    from megatron_qwen.distributed.rank import RankInfo, join

    info = RankInfo.from_environment()
    join(info, timeout_minutes=10)
    place, world = device.current(), info.world_size
    share = (world - 1) / world
    found: dict[str, dict[str, list[float]]] = {}
    for size, count in SIZES.items():
        whole = torch.ones(count // 4, device=place)
        part = torch.ones(count // 4 // world, device=place)
        target = torch.empty_like(whole)
        parts, targets = list(whole.chunk(world)), list(target.chunk(world))
        calls: dict[str, tuple[float, Callable[[], object]]] = {
            "all-reduce": (2 * share, partial(dist.all_reduce, whole)),
            "all-gather": (share, partial(dist.all_gather_into_tensor, target, part)),
            "reduce-scatter": (share, partial(dist.reduce_scatter_tensor, part, whole)),
            "all-to-all": (share, partial(dist.all_to_all, targets, parts)),
            "send and receive": (1.0, partial(_send_on, whole, target)),
            "copy": (1.0, partial(target.copy_, whole)),
        }
        for name, (factor, call) in calls.items():
            seconds = _times(call, rounds, dist.barrier)
            found.setdefault(name, {})[size] = [count * factor / second / 1e9 for second in seconds]
    dist.destroy_process_group()
    return found


def _send_on(whole: Any, target: Any) -> None:
    """To the next rank, from the one before."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    sends = dist.P2POp(dist.isend, whole, (rank + 1) % world), dist.P2POp(dist.irecv, target, (rank - 1) % world)
    for work in dist.batch_isend_irecv(list(sends)):
        work.wait()


def _times(call: Callable[[], object], rounds: int, barrier: Callable[[], object]) -> list[float]:
    call()
    device.synchronize()
    barrier()
    seconds = []
    for _ in range(rounds):
        several = []
        for _ in range(5):
            barrier()
            started = time.perf_counter()
            call()
            device.synchronize()
            several.append(time.perf_counter() - started)
        seconds.append(statistics.median(several))
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
