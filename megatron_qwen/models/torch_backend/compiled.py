"""Compiles memory-bound operations to one kernel each (torch.compile), in runs with ``performance.compile``."""

import logging
import os
import shlex
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

log = logging.getLogger(__name__)

# Variants of one formula that torch.compile may make: widths of norms, training and validation, and micro-batch shapes
# of a batch ramp-up or of data stages. Beyond torch's default limit of 8 it runs uncompiled.
_MOST_KERNELS = 64


def compiler_is_here() -> bool:
    """Whether a C++ compiler is on the path; it is not run."""
    return shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is not None


class Kernels:
    """The compiled kernels of a process.

    One object per process, since autograd functions belong to no module that could hold it.
    """

    def __init__(self) -> None:
        self._on = False
        self._made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def use(self, on: bool) -> None:
        """Switches compiled kernels on or off."""
        self._on = on

    def of[T](self, formula: Callable[..., T]) -> Callable[..., T] | None:
        """The compiled formula, or None where kernels are off."""
        if not self._on:
            return None
        if formula not in self._made:
            self._made[formula] = self._or_as_written(formula)
        return self._made[formula]

    def why_not(self) -> str | None:
        """Compiles a small function: the first line of the error, or None where compilation works."""
        try:
            _compiled(_trial)(torch.ones(8))
        except Exception as error:  # whatever a compiler raises
            return _first_line(error)
        return None

    def _or_as_written[T](self, formula: Callable[..., T]) -> Callable[..., T]:
        """The compiled formula, with the plain one as a fallback: a failed compilation must not end a run."""
        compiled = _compiled(formula)

        def call(*args: Any) -> T:
            try:
                return compiled(*_without_autograd(args))
            except TorchDynamoException as error:  # raised by the compiler, before anything was computed
                self.use(False)
                log.warning(
                    "torch.compile failed; this rank continues with uncompiled operations, which round differently: %s",
                    _first_line(error),
                )
                return formula(*args)

        return call


def _compiled[T](formula: Callable[..., T]) -> Callable[..., T]:
    import torch._dynamo.config
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # otherwise it starts worker processes, which outlive a killed rank
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_KERNELS)
    return torch.compile(formula)


def _without_autograd(args: tuple[Any, ...]) -> list[Any]:
    """Tensors detached from autograd: torch.compile makes separate variants for tensors that require a gradient, which
    has no meaning inside an autograd function."""
    return [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]


def _trial(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * x


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


kernels = Kernels()
