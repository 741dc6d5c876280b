"""Prefetches batches: while a step computes, the samples of the next ones are read."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from megatron_qwen.data.loaders.batches import Batch, BatchRequest, BatchSlice, micro_batches
from megatron_qwen.data.reading.samples import SampleSource

Upcoming = Callable[[], Iterator[tuple[SampleSource, BatchRequest]]]


class Loader(Protocol):
    """Gives a rank the micro-batches of a step."""

    def load(self, source: SampleSource, request: BatchRequest, upcoming: Upcoming) -> list[Batch]:
        """The micro-batches of a step, on the rank's device; starts prefetching those of later steps.

        Raises:
            DataError: the data of this step is damaged.
        """

    def close(self) -> None:
        """Stops prefetching."""


class MemoryMapLoader:
    """Reads from memory maps in one background thread.

    Args:
        batch_slice: the rank's part of a batch.
        ahead: number of steps to prefetch; 0 reads in the calling thread.
    """

    def __init__(self, batch_slice: BatchSlice, *, ahead: int) -> None:
        self.batch_slice, self.ahead = batch_slice, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader") if ahead else None
        self._ready: list[tuple[int, BatchRequest, Future[list[Batch]]]] = []

    def load(self, source: SampleSource, request: BatchRequest, upcoming: Upcoming) -> list[Batch]:
        """See ``Loader``."""
        if self._thread is None:
            return self._on_device(self._read(source, request))
        while self._ready and self._ready[0][:2] != (id(source), request):
            self._ready.pop(0)[2].cancel()  # prefetched for a step that does not come
        if not self._ready:
            self._send(source, request)
        future = self._ready.pop(0)[2]
        for number, (following, wanted) in enumerate(upcoming()):
            if number >= self.ahead:
                break
            if number >= len(self._ready):
                self._send(following, wanted)
        return self._on_device(future.result())

    def close(self) -> None:
        """See ``Loader``."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _send(self, source: SampleSource, request: BatchRequest) -> None:
        assert self._thread is not None
        self._ready.append((id(source), request, self._thread.submit(self._read, source, request)))

    def _read(self, source: SampleSource, request: BatchRequest) -> list[Batch]:
        batches = list(micro_batches(source, self.batch_slice, request))
        return [batch.pinned() for batch in batches] if self.batch_slice.device.type == "cuda" else batches

    def _on_device(self, batches: Sequence[Batch]) -> list[Batch]:
        return [batch.to(self.batch_slice.device) for batch in batches]
