"""How far a calibration is, and how long it still takes."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from megatron_qwen.metrics.console import duration


@dataclass(frozen=True)
class LayerSeconds:
    """Where the time of a layer went.

    Args:
        run: running the layer over the samples.
        sums: Hessians and other sums over its inputs.
        solve: everything else: factorising, rounding, reading and writing.
    """

    run: float
    sums: float
    solve: float


@dataclass(frozen=True)
class CalibrationProgress:
    """A layer begins or is done.

    Args:
        done: layers that are done.
        layers: of the model.
        kept: of those done, layers of an earlier start.
        seconds: since this start began.
        layer: seconds of the last layer that this start solved; None before.
    """

    done: int
    layers: int
    kept: int
    seconds: float
    layer: LayerSeconds | None

    @property
    def seconds_left(self) -> float | None:
        """At the mean of the layers that this start solved; None before the first one is done."""
        solved = self.done - self.kept
        return None if solved <= 0 else self.seconds / solved * (self.layers - self.done)

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f"  {duration(self.seconds_left)} left"
        kept = f", {self.kept} of them kept" if self.kept else ""
        return f"calibrated {self.done} of {self.layers} layers{kept}  {duration(self.seconds)}{left}"


TakeProgress = Callable[[CalibrationProgress], None]


def shown_on(stream: TextIO = sys.stderr) -> TakeProgress:
    """Shows progress: a terminal gets one line that is written over, anything else a line a layer."""
    live = stream.isatty()

    def show(progress: CalibrationProgress) -> None:
        end = "\n" if not live or progress.done == progress.layers else ""
        stream.write(f"\r\x1b[2K{progress}{end}" if live else f"{progress}{end}")
        stream.flush()

    return show


class LayerClock:
    """Makes the progress of layers that are solved one after the other.

    Args:
        layers: of the model.
        kept: those of an earlier start.
        take: gets the progress.
    """

    def __init__(self, layers: int, *, kept: int, take: TakeProgress) -> None:
        self._layers, self._kept, self._take = layers, kept, take
        self._started = self._last = time.monotonic()
        self._run = self._sums = 0.0
        take(CalibrationProgress(kept, layers, kept, 0.0, None))

    def begin(self, *, run: float, sums: float) -> None:
        """The first layer begins; what came before (running the layers that are kept) is not part of a layer.

        Args:
            run: seconds spent so far on running layers.
            sums: and on sums over inputs.
        """
        self._started = self._last = time.monotonic()
        self._run, self._sums = run, sums

    def done(self, layers: int, *, run: float, sums: float) -> None:
        """So many layers are done; ``run`` and ``sums`` as in ``begin``."""
        now = time.monotonic()
        parts = run - self._run, sums - self._sums
        layer = LayerSeconds(*parts, now - self._last - sum(parts))
        self._take(CalibrationProgress(layers, self._layers, self._kept, now - self._started, layer))
        self._last, self._run, self._sums = now, run, sums
