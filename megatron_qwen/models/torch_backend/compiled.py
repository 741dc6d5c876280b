"""Small operations as one kernel each (torch.compile), in the runs that are long enough to pay for the compiler."""

import logging
import os
import shlex
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

log = logging.getLogger(__name__)

# Kernels of one formula: widths of norms, training and validation, and micro-batches of a ramp or a curriculum.
_MOST_KERNELS = 64


def compiler_is_here() -> bool:
    """Whether there is a C++ compiler, without trying it."""
    return shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is not None


class Kernels:
    """The kernels of a process: autograd's functions have no module that could hold a switch."""

    def __init__(self) -> None:
        self._on = False
        self._made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def use(self, on: bool) -> None:
        """Whether ``of`` gives kernels from now on."""
        self._on = on

    def of[T](self, formula: Callable[..., T]) -> Callable[..., T] | None:
        """The compiled formula, or None where this process does without."""
        if not self._on:
            return None
        if formula not in self._made:
            self._made[formula] = self._or_as_written(formula)
        return self._made[formula]

    def why_not(self) -> str | None:
        """Compiles something small: what the compiler says, or None where it works."""
        try:
            _compiled(_trial)(torch.ones(8))
        except Exception as error:  # whatever a compiler raises
            return _first_line(error)
        return None

    def _or_as_written[T](self, formula: Callable[..., T]) -> Callable[..., T]:
        """A run does not end because a later kernel cannot be made: the formula is then computed as it stands."""
        compiled = _compiled(formula)

        def call(*args: Any) -> T:
            try:
                return compiled(*_without_autograd(args))
            except TorchDynamoException as error:  # of the compiler: nothing has been computed yet
                self.use(False)
                log.warning("this rank goes on without kernels, and rounds otherwise: %s", _first_line(error))
                return formula(*args)

        return call


def _compiled[T](formula: Callable[..., T]) -> Callable[..., T]:
    import torch._dynamo.config
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # else it starts processes of its own, which outlive a killed rank
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_KERNELS)
    return torch.compile(formula)


def _without_autograd(args: tuple[Any, ...]) -> list[Any]:
    """Kernels are made anew for tensors that want a gradient, which means nothing inside of an autograd function."""
    return [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]


def _trial(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * x


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


kernels = Kernels()
