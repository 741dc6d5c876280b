"""``mq bench collectives``: the messages of training against a copy in memory, their limit on one machine."""

import statistics
from collections.abc import Iterator

from megatron_qwen import device
from tools.dev.benchmarks.ranks import measure
from tools.dev.benchmarks.rows import BenchmarkRow, against_peer

_CPU_RANKS = 2


def run(*, rounds: int) -> list[BenchmarkRow]:
    """A row a message and size, in GB/s that each rank sends at least.

    On GPUs every device of the node is a rank; on a CPU there are two.

    Args:
        rounds: timings that count.
    """
    return list(_rows(rounds))


def speeds_of_links(rounds: int) -> dict[str, dict[str, float]]:
    """Median GB/s by message and size between this machine's ranks."""
    found = _measured(rounds)
    return {name: {size: statistics.median(each) for size, each in sizes.items()} for name, sizes in found.items()}


def _measured(rounds: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = measure(
        "tools.dev.benchmarks.collectives_worker", [str(rounds)], ranks=device.count() or _CPU_RANKS
    )
    return found


def _rows(rounds: int) -> Iterator[BenchmarkRow]:
    ranks = device.count() or _CPU_RANKS
    found = _measured(rounds)
    copies = found.pop("copy")
    for name, sizes in found.items():
        for size, speeds in sizes.items():
            limit = statistics.median(copies[size])
            yield against_peer(
                f"{name}, {size}",
                [speed / limit for speed in speeds],
                ours=statistics.median(speeds),
                against=limit,
                unit="GB/s",
                peer="copy in memory by the same ranks at once",
                required=0.0,
                conditions=f"{ranks} ranks, {device.backend()}, {device.device_name()}, {rounds} rounds",
            )
