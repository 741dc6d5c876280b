"""Compiles memory-bound operations to one kernel each (torch.compile), in runs with ``performance.compile``."""

import logging
import os
import shlex
import shutil
from collections.abc import Callable
from typing import Any

import torch

from megatron_qwen.core_patches import compiler_settings

log = logging.getLogger(__name__)

# Variants of one formula that torch.compile may make: widths of norms, training and validation, and micro-batch shapes
# of a batch ramp-up or of data stages. Beyond torch's default limit of 8 it runs uncompiled.
_MOST_KERNELS = 64


def compiler_is_here() -> bool:
    """Whether a C++ compiler is on the path; it is not run."""
    return shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is not None


def compiler_failure() -> str | None:
    """Compiles something small: what the compiler says, or None where it works."""
    try:
        _compiled(_trial)(torch.ones(8))
    except Exception as error:  # whatever a compiler raises
        return _first_line(error)
    return None


class Kernels:
    """The compiled formulas of a run, each made when it is first asked for; none once the compiler has failed."""

    def __init__(self) -> None:
        self._work = True
        self._made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def of[T](self, formula: Callable[..., T]) -> Callable[..., T] | None:
        """The compiled formula, or None once the compiler has failed."""
        if not self._work:
            return None
        if formula not in self._made:
            self._made[formula] = self._or_as_written(formula)
        return self._made[formula]

    def _or_as_written[T](self, formula: Callable[..., T]) -> Callable[..., T]:
        """A run does not end because a later kernel cannot be made: the formula is then computed as it stands."""
        # Imported here: it brings torch's compiler with it, which a run without kernels need not wait for.
        from torch._dynamo.exc import TorchDynamoException

        compiled = _compiled(formula)

        def call(*args: Any) -> T:
            try:
                return compiled(*_without_autograd(args))
            except TorchDynamoException as error:  # of the compiler: nothing has been computed yet
                self._work = False
                failed = "torch.compile failed; this rank continues with uncompiled operations, which round differently"
                log.warning("%s: %s", failed, _first_line(error))
                return formula(*args)

        return call


def _compiled[T](formula: Callable[..., T]) -> Callable[..., T]:
    compiler_settings.apply(kernels=_MOST_KERNELS)
    return torch.compile(formula)


def _without_autograd(args: tuple[Any, ...]) -> list[Any]:
    """Tensors detached from autograd: torch.compile makes separate variants for tensors that require a gradient, which
    has no meaning inside an autograd function."""
    return [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]


def _trial(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * x


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
