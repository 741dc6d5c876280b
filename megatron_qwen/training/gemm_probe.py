"""A small fixed amount of work that tells how fast a GPU computes just now."""

import statistics

import torch

from megatron_qwen import device

# On an idle queue, some milliseconds at most: under a thousandth of a window of steps. 24 MiB of memory. By hand.
_SIZE, _GEMMS, _REPEATS = 2048, 16, 3


class GemmProbe:
    """Times bf16 GEMMs with events of the device, when its queue is empty.

    Args:
        place: the GPU.
    """

    def __init__(self, place: torch.device) -> None:
        # Values do change a GPU's power draw and with it its clock: the same on every rank, and none of them zero.
        values = torch.linspace(-1.0, 1.0, _SIZE * _SIZE, device=place).view(_SIZE, _SIZE)
        self._left = values.to(torch.bfloat16)
        self._right = self._left.t().contiguous()
        self._out = torch.empty_like(self._left)
        self.seconds()  # the first call loads the kernel

    def seconds(self) -> float:
        """Median of a few timings."""
        return statistics.median(device.elapsed_s(self._work) for _ in range(_REPEATS))

    def _work(self) -> None:
        for _ in range(_GEMMS):
            torch.mm(self._left, self._right, out=self._out)
