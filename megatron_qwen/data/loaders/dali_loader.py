"""Prefetches batches with NVIDIA DALI: the samples of the memory-map loader, copied to the device by DALI."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from megatron_qwen.data.loaders.batches import Batch, BatchRequest, BatchSlice, micro_batches
from megatron_qwen.data.loaders.read_ahead import Upcoming
from megatron_qwen.data.reading.samples import SampleSource
from megatron_qwen.errors import ConfigError, Problem

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class DaliLoader:
    """A DALI pipeline that takes micro-batches on the host and returns them on the device.

    The copy of a micro-batch to the GPU runs on DALI's own stream, so it overlaps with the model's kernels.

    Args:
        batch_slice: the rank's part of a batch.
        ahead: number of steps to prefetch.

    Raises:
        ConfigError: DALI is not installed.
    """

    def __init__(self, batch_slice: BatchSlice, *, ahead: int) -> None:
        self.batch_slice, self.ahead = batch_slice, ahead
        self._pipeline = _build(batch_slice.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._reading: deque[tuple[int, BatchRequest, Future[list[Batch]]]] = deque()
        self._fed: deque[list[Batch]] = deque()  # the first steps of _reading that were handed to DALI

    def load(self, source: SampleSource, request: BatchRequest, upcoming: Upcoming) -> list[Batch]:
        """See ``Loader``."""
        while self._reading and self._reading[0][:2] != (id(source), request):
            self._drop()  # prefetched for a step that does not come
        if not self._reading:
            self._read(source, request)
        if not self._fed:
            self._feed()
        self._reading.popleft()
        batches = [self._take(batch) for batch in self._fed.popleft()]
        for number, (following, wanted) in enumerate(upcoming()):
            if number >= self.ahead:
                break
            if number >= len(self._reading):
                self._read(following, wanted)
        while self._is_read():
            self._feed()  # the copy to the device begins while the step computes
        return batches

    def close(self) -> None:
        """See ``Loader``."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, source: SampleSource, request: BatchRequest) -> None:
        future = self._thread.submit(lambda: list(micro_batches(source, self.batch_slice, request)))
        self._reading.append((id(source), request, future))

    def _is_read(self) -> bool:
        """Whether a step is ready for DALI. A step that could not be read raises its error when it is loaded."""
        if len(self._fed) == len(self._reading):
            return False
        future = self._reading[len(self._fed)][2]
        return future.done() and future.exception() is None

    def _feed(self) -> None:
        """Hands DALI the next step that was read."""
        batches = self._reading[len(self._fed)][2].result()
        for batch in batches:
            for field in _FIELDS:
                self._pipeline.feed_input(field, [getattr(batch, field).numpy()])
            self._pipeline.schedule_run()
        self._fed.append(batches)

    def _drop(self) -> None:
        _, _, future = self._reading.popleft()
        if self._fed:
            for _ in self._fed.popleft():
                self._pipeline.outputs()
        future.cancel()

    def _take(self, read: Batch) -> Batch:
        """The pipeline's next output. What a batch need not have bypasses the pipeline, whose inputs are fixed."""
        outputs = self._pipeline.outputs()
        tensors = {field: _tensor(output) for field, output in zip(_FIELDS, outputs, strict=True)}
        place = self.batch_slice.device
        cu_seqlens = None if read.cu_seqlens is None else read.cu_seqlens.to(place, non_blocking=True)
        padding = None if read.padding is None else read.padding.to(place, non_blocking=True)
        extra = {name: tensor.to(place, non_blocking=True) for name, tensor in read.extra.items()}
        return Batch(**tensors, cu_seqlens=cu_seqlens, seq_lengths=read.seq_lengths, padding=padding, extra=extra)


def _build(device: torch.device) -> Any:
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        fix = f"needs NVIDIA DALI ({error}): pip install 'megatron_qwen[dali]', or set data.loader=mmap."
        raise ConfigError(Problem("data.loader", "dali", fix)) from None
    gpu = device.type == "cuda"
    # With a deeper queue the first call would run the pipeline before its inputs were fed.
    pipeline = Pipeline(
        batch_size=1, num_threads=1, device_id=device.index if gpu else None, exec_dynamic=True, prefetch_queue_depth=1
    )
    kinds = {"loss_mask": types.FLOAT}
    with pipeline:
        inputs = [fn.external_source(name=field, dtype=kinds.get(field, types.INT64), ndim=2) for field in _FIELDS]
        pipeline.set_outputs(*(item.gpu() if gpu else item for item in inputs))
    pipeline.build()
    return pipeline


def _tensor(output: Any) -> torch.Tensor:
    """A copy of an output, because DALI reuses its buffers."""
    return torch.utils.dlpack.from_dlpack(output[0]).clone()
