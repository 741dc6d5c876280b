"""What ranks do for the tests of a step: they begin with given weights, take steps, and say what they saw."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_qwen.config.run import RunConfig
from tests.distributed import jobs

LOUD, ROUTER_LOUD = 0.1, 20.0


def save_loud_start(config: RunConfig, checkpoints: Path) -> None:
    """Saves a fresh model whose norms and biases differ from one another, and whose routers prefer experts.

    As drawn, norms are 1, biases 0 and experts chosen evenly: decay of a bias, two norms that are swapped, or a
    balance over other tokens would not be seen.
    """
    import torch

    from megatron_qwen.training.build import build_components

    components = build_components(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in components.model.modules:
            for name, parameter in module.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(LOUD * torch.randn(parameter.shape, generator=generator))
                elif name.endswith("router.weight"):
                    parameter.mul_(ROUTER_LOUD)
    components.optimizer.reload_model_params()  # main weights are those of the model
    jobs.save(components, checkpoints)


def digest(components: Any) -> str:
    """SHA-256 of every weight and moment this rank holds."""
    total = hashlib.sha256()
    for module in components.model.modules:
        for parameter in module.parameters():
            total.update(parameter.detach().numpy().tobytes())
    for part in components.optimizer.chained_optimizers:
        states = [] if part.is_stub_optimizer else part.optimizer.state.values()
        for state in states:
            for key in ("exp_avg", "exp_avg_sq"):
                total.update(state[key].numpy().tobytes())
    return total.hexdigest()


def _resumed(config: RunConfig, run_dir: Path) -> tuple[Any, Any]:
    """A run that has loaded its start, and its directory."""
    from megatron_qwen.rundir import RunDirectory
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.resume import resume

    components, directory = build_components(config), RunDirectory(run_dir)
    resume(components, directory)
    return components, directory


def _reported(trainer: Any, record: Any) -> dict[str, Any]:
    """What a step says of itself, and where the run then is."""
    return {
        **asdict(record.result),
        "learning_rate": record.learning_rate,
        **trainer.components.progress.as_dict(),
        "extra": dict(record.extra),
        "digest": digest(trainer.components),
    }


def steps_from(config: RunConfig, run_dir: Path, steps: int) -> list[dict[str, Any]]:
    """Starts from ``checkpoint.load``, takes steps, and saves the last state under the run directory."""
    from megatron_qwen.training.lora_start import base_of_run
    from megatron_qwen.training.trainer import Trainer

    components, directory = _resumed(config, run_dir)
    trainer = Trainer(components, [])
    found = [_reported(trainer, trainer.step()) for _ in range(steps)]
    jobs.save(components, directory.checkpoints, noted=base_of_run(directory))
    return found


def steps_with_callbacks(config: RunConfig, run_dir: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """All steps of a run, with callbacks that are named as module.Class; returns what each step reported."""
    import importlib

    from megatron_qwen.training.trainer import Trainer

    components, _ = _resumed(config, run_dir)
    callbacks = []
    for name in names:
        module, _, kind = name.partition(".")
        callbacks.append(getattr(importlib.import_module(f"megatron_qwen.training.callbacks.{module}"), kind)())
    recorder = _recorder()
    assert Trainer(components, [*callbacks, recorder]).fit() == 0
    return recorder.found


def steps_with_bad_ones(config: RunConfig, run_dir: Path, bad: dict[int, str], poisoned: int) -> dict[str, Any]:
    """All steps of a run whose numbers are not finite in some steps on one rank, until it ends or gives up.

    Args:
        config: with ``checkpoint.load``.
        run_dir: empty.
        bad: by iteration, what is not finite: the ``loss`` alone, or the ``gradient`` alone.
        poisoned: the rank.

    Returns:
        ``steps`` that callbacks saw, and the ``exit_code`` and ``message`` of the error that ended it, or None.
    """
    import torch.distributed as dist

    from megatron_qwen.errors import NumericsError
    from megatron_qwen.training.callbacks.numerics import NumericsGuard
    from megatron_qwen.training.trainer import Trainer

    components, _ = _resumed(config, run_dir)

    def spoilt(what: str) -> bool:
        return dist.get_rank() == poisoned and bad.get(components.progress.iteration + 1) == what

    def spoil_gradient(gradient: Any) -> Any:
        return gradient * float("inf") if spoilt("gradient") else gradient

    next(components.model.modules[0].parameters()).register_hook(spoil_gradient)
    recorder = _recorder()
    forward = _SpoiltLoss(components.forward_step, spoilt)
    trainer = Trainer(replace(components, forward_step=forward), [recorder, NumericsGuard()])
    exit_code, message = 0, None
    try:
        exit_code = trainer.fit()
    except NumericsError as error:
        exit_code, message = error.exit_code, error.render()
    return {"steps": recorder.found, "exit_code": exit_code, "message": message}


class _SpoiltLoss:
    """A forward step whose loss is not a number where it is reported, and as it was where it is differentiated."""

    def __init__(self, forward: Any, spoilt: Any) -> None:
        self.forward, self.spoilt, self.metrics = forward, spoilt, forward.metrics

    def __call__(self, batches: Any, chunk: Any) -> tuple[Any, Any]:
        output, reduce = self.forward(batches, chunk)

        def reduced(result: Any) -> tuple[Any, Any, dict[str, Any]]:
            loss, weight, report = reduce(result)
            if self.spoilt("loss"):
                report = {
                    name: value.new_tensor([float(value[0]), float("nan"), float(value[2])])
                    for name, value in report.items()
                }
            return loss, weight, report

        return output, reduced


def _recorder() -> Any:
    from megatron_qwen.training.callbacks.base import Callback

    class Recorder(Callback):
        """Keeps what every step reported."""

        def __init__(self) -> None:
            self.found: list[dict[str, Any]] = []
            self.updates = 0

        def before_optimizer_step(self, trainer: Any) -> None:
            self.updates += 1

        def after_step(self, trainer: Any, record: Any) -> None:
            self.found.append(_reported(trainer, record) | {"updates": self.updates})

    return Recorder()


def flip_a_frozen_weight(config: RunConfig, run_dir: Path) -> str:
    """Changes a bit of a weight that is not trained; how the check of held state names it begins with this word."""
    import torch

    from megatron_qwen.training.integrity import held_state

    components, _ = _resumed(config, run_dir)
    held = held_state.weights(components, expert=False)
    frozen = [name for name in held if name.startswith("frozen ")]
    own = [name for name in held if not name.startswith("frozen ")]
    assert len(own) == 1
    named = [pair for module in components.model.modules for pair in module.named_parameters()]
    names = {name for name, parameter in named if not parameter.requires_grad}
    expert = held_state.weights(components, expert=True)
    assert len(names) == len(frozen) + sum(name.startswith("frozen ") for name in expert)
    before = held_state.fingerprints(list(held.values()))
    with torch.no_grad():
        held[frozen[3]].view(torch.int32).view(-1)[0] ^= 1
    after = held_state.fingerprints(list(held.values()))
    (changed,) = [name for name, a, b in zip(held, before, after, strict=True) if a != b]
    return changed.split()[0]
