"""Ranks whose memory changes: one bit of weights, gradients or optimizer state of a rank, once or again and again."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_qwen.config.run import RunConfig
from tests.distributed import jobs


@dataclass(frozen=True)
class Flip:
    """A flipped bit.

    Args:
        where: what it is in.
        rank: whose.
        iteration: the step that meets it first.
        position: of the word, as a share of all words.
        bit: of the word.
        always: in every run of every step from then on, or in the first run of this step alone.
        moment: gradients apart: after the update before the step, or during its forward pass.
    """

    where: Literal["weights", "gradients", "optimizer"]
    rank: int
    iteration: int
    position: float
    bit: int
    always: bool = False
    moment: Literal["between steps", "forward"] = "between steps"


def attempt(config: RunConfig, run_dir: Path, flip: Flip | None) -> dict[str, Any]:
    """One attempt at a run as a rank of ``mq train`` makes it, with a flipped bit.

    Returns:
        ``code``, and of an error its ``message``, ``exit_code`` and ``suspects``.
    """
    from megatron_qwen.errors import SilentCorruptionError, UserError

    try:
        with _injected(flip):
            return {"code": jobs.attempt(config, run_dir)}
    except UserError as error:
        suspects = error.suspects if isinstance(error, SilentCorruptionError) else None
        return {"code": error.exit_code, "message": str(error), "suspects": suspects}


@contextmanager
def _injected(flip: Flip | None) -> Iterator[None]:
    from megatron_qwen.training import attempt as attempt_module

    if flip is None:
        yield
        return
    kept = attempt_module.build_components, attempt_module.build_callbacks

    def build_components(config: RunConfig) -> Any:
        components = kept[0](config)
        injector.components = components
        forward = functools.partial(injector.forward, components.forward_step)
        forward.metrics = components.forward_step.metrics  # type: ignore[attr-defined]
        return dataclasses.replace(components, forward_step=forward)

    def build_callbacks(*arguments: Any, **words: Any) -> list[Any]:
        return [*kept[1](*arguments, **words), injector.callback()]

    injector = _Injector(flip)
    attempt_module.build_components, attempt_module.build_callbacks = build_components, build_callbacks  # type: ignore[assignment]
    try:
        yield
    finally:
        attempt_module.build_components, attempt_module.build_callbacks = kept


class _Injector:
    """Flips the bit when its time has come."""

    def __init__(self, flip: Flip) -> None:
        self.flip, self.components, self._calls, self._done = flip, None, 0, False

    def callback(self) -> Any:
        from megatron_qwen.training.callbacks.base import Callback

        injector = self

        class Injecting(Callback):
            """Between steps."""

            def after_step(self, trainer: Any, record: Any) -> None:
                injector.between(record.iteration + 1)

        return Injecting()

    def between(self, following: int) -> None:
        """After the step before ``following``."""
        if self.flip.moment == "between steps" and self.flip.where != "gradients":
            self._apply(following)

    def forward(self, inner: Any, batches: Any, chunk: Any) -> Any:
        """Calls the forward pass. Gradients are hit before the last micro-batch: there is a sum of the others then."""
        training = self.components.config.training  # type: ignore[attr-defined]
        self._calls += 1
        micro = training.global_batch_size // training.micro_batch_size // self.components.batch_slice.dp_size  # type: ignore[attr-defined]
        if self._calls % micro == 0 and (self.flip.where == "gradients" or self.flip.moment == "forward"):
            self._apply(self.components.progress.iteration + 1)  # type: ignore[attr-defined]
        return inner(batches, chunk)

    def _apply(self, iteration: int) -> None:
        import torch
        import torch.distributed as dist

        flip = self.flip
        due = iteration >= flip.iteration if flip.always else iteration == flip.iteration and not self._done
        if dist.get_rank() != flip.rank or not due:
            return
        self._done = True
        held = self._tensors()
        index = int(flip.position * sum(tensor.numel() for tensor in held))
        for tensor in held:
            if index < tensor.numel():
                words = tensor.detach().view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
                bit = flip.bit % (8 * tensor.element_size())
                if flip.where == "gradients":
                    # In rows of the embedding that no token has met, the highest bit of an exponent makes 0 a 2.
                    there = (tensor.abs() > 1e-12).view(-1).nonzero().flatten()
                    index = int(there[index % len(there)])
                words[index] ^= torch.tensor(1 << bit, dtype=torch.int64).to(words.dtype)
                return
            index -= tensor.numel()

    def _tensors(self) -> list[Any]:
        components = self.components
        buffers = [buffer for chunk in components.model.chunks for buffer in chunk.buffers]  # type: ignore[attr-defined]
        if self.flip.where == "weights":
            return [parameter.data for module in components.model.modules for parameter in module.parameters()]  # type: ignore[attr-defined]
        if self.flip.where == "gradients":
            return [parameter.main_grad for buffer in buffers for parameter in buffer.params]
        from megatron_qwen.training.integrity.held_state import optimizer_state

        return list(optimizer_state(components).values())
