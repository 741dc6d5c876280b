"""Batches read ahead by NVIDIA DALI: the memory-map loader's samples, copied to the device by DALI."""

from collections import deque
from typing import Any

import torch

from megatron_qwen.data.batches import Batch, Request, Shard, micro_batches
from megatron_qwen.data.loader import Upcoming
from megatron_qwen.data.samples import Source
from megatron_qwen.errors import ConfigError, Problem

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class DaliLoader:
    """A DALI pipeline that is fed micro-batches and gives them back on the device.

    The copy of a micro-batch to the GPU runs on DALI's own stream, so it overlaps with what the model computes.

    Args:
        shard: the rank's part of a batch.
        ahead: steps that are read ahead.

    Raises:
        ConfigError: DALI is not installed.
    """

    def __init__(self, shard: Shard, *, ahead: int) -> None:
        self.shard, self.ahead = shard, ahead
        self._pipeline = _build(shard.device)
        self._fed: deque[tuple[int, Request, list[Batch]]] = deque()

    def load(self, source: Source, request: Request, upcoming: Upcoming) -> list[Batch]:
        """See ``Loader``."""
        while self._fed and self._fed[0][:2] != (id(source), request):
            for _ in self._fed.popleft()[2]:  # the run has gone another way than foreseen
                self._pipeline.outputs()
        if not self._fed:
            self._feed(source, request)
        batches = [self._take(batch) for batch in self._fed.popleft()[2]]
        for number, (following, wanted) in enumerate(upcoming()):
            if number >= self.ahead:
                break
            if number >= len(self._fed):
                self._feed(following, wanted)
        return batches

    def close(self) -> None:
        """See ``Loader``."""
        self._fed.clear()

    def _feed(self, source: Source, request: Request) -> None:
        batches = list(micro_batches(source, self.shard, request))
        for batch in batches:
            for field in _FIELDS:
                self._pipeline.feed_input(field, [getattr(batch, field).numpy()])
            self._pipeline.schedule_run()
        self._fed.append((id(source), request, batches))

    def _take(self, read: Batch) -> Batch:
        """The pipeline's next output; bounds, which the host needs too, go beside it."""
        outputs = self._pipeline.outputs()
        tensors = {field: _tensor(output) for field, output in zip(_FIELDS, outputs, strict=True)}
        bounds = None if read.bounds is None else read.bounds.to(self.shard.device, non_blocking=True)
        return Batch(**tensors, bounds=bounds, lengths=read.lengths)


def _build(device: torch.device) -> Any:
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        fix = f"needs NVIDIA DALI ({error}): pip install 'megatron_qwen[dali]', or set data.loader=mmap."
        raise ConfigError(Problem("data.loader", "dali", fix)) from None
    gpu = device.type == "cuda"
    # A deeper queue would run, at its first call, ahead of what it was fed.
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
    """A copy: DALI uses its buffers again."""
    return torch.utils.dlpack.from_dlpack(output[0]).clone()
