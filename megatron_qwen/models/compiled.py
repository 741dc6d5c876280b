"""Small operations as one kernel each (torch.compile), in the runs that are long enough to pay for the compiler."""

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)


def compiler_is_here() -> bool:
    """Whether torch.compile can make kernels for this machine's CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


class Kernels:
    """The kernels of a process: autograd's functions have no module that could hold a switch."""

    def __init__(self) -> None:
        self._on = False
        self._made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def use(self, on: bool) -> None:
        """Whether ``of`` gives kernels from now on."""
        self._on = on

    def of[**P, T](self, formula: Callable[P, T]) -> Callable[P, T] | None:
        """The compiled formula, or None where this process does without."""
        if not self._on:
            return None
        if formula not in self._made:
            self._made[formula] = self._or_as_written(formula)
        return self._made[formula]

    def _or_as_written[**P, T](self, formula: Callable[P, T]) -> Callable[P, T]:
        """What cannot be compiled here is computed as it stands, with a warning: a run must not end for that."""
        from torch._inductor import config

        config.compile_threads = 1  # else it starts processes of its own, which outlive a killed rank
        compiled = torch.compile(formula)

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return compiled(*args, **kwargs)
            except Exception as error:  # whatever a compiler raises; an error of the formula itself comes again
                self.use(False)
                reason = str(error).strip().partition("\n")[0]
                log.warning("performance.compile=false from here on: torch.compile failed on this rank: %s", reason)
                return formula(*args, **kwargs)

        return call


kernels = Kernels()
