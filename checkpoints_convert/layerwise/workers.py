"""Threads that share the matrices of a layer, with results that do not depend on how many there are."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Workers:
    """Runs pieces of work on threads of one core each.

    A GEMM sums in another order when torch splits it over another number of threads. So torch splits nothing here
    (``set_num_threads`` counts for the thread that calls it), and the pieces are cut by size, never by the number of
    workers.

    Args:
        count: threads.
    """

    def __init__(self, count: int) -> None:
        assert count >= 1, count
        self.count = count
        self._pool = ThreadPoolExecutor(count, "layer", initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map[Item, Result](self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """What ``work`` makes of the items, in their order; gradients are off."""

        @torch.no_grad()
        def run(item: Item) -> Result:
            return work(item)

        return list(self._pool.map(run, items))
