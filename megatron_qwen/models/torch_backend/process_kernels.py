"""The kernels that the autograd functions of this process compute with.

A run owns its ``Kernels`` (compiled.py). Autograd functions are classes without instances, called by the engine, and
have nowhere to keep them; so the process has one holder, the only one of its kind. training/kernels.py fills it for
each run, before the model is built, on all ranks alike: kernels round otherwise. Nothing else writes to it. Tests use
``using``, which puts back what was there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_qwen.models.torch_backend.compiled import Kernels


class ProcessKernels:
    """Holds the kernels of the present run, or None where it computes without."""

    def __init__(self) -> None:
        self.present: Kernels | None = None

    def use(self, kernels: Kernels | None) -> None:
        """Has the process compute with these from now on."""
        self.present = kernels

    @contextmanager
    def using(self, kernels: Kernels | None) -> Iterator[None]:
        """Has the process compute with these inside, and afterwards as before."""
        before = self.present
        self.use(kernels)
        try:
            yield
        finally:
            self.use(before)

    def of[T](self, formula: Callable[..., T]) -> Callable[..., T] | None:
        """The formula as a kernel, or None where it is computed step by step."""
        return None if self.present is None else self.present.of(formula)


PROCESS_KERNELS = ProcessKernels()
