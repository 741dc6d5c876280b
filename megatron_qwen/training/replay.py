"""Takes the steps of a run again, up to one of them, and compares them with what the run recorded.

Nothing is written into the run: no checkpoint, no metrics, no attempt, no status.
"""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.json_lines import objects
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.build import build_components
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.integrity.fingerprint import combined, fingerprints
from megatron_qwen.training.integrity.held_state import weights
from megatron_qwen.training.integrity.rerun import StepInputs
from megatron_qwen.training.resume import resume
from megatron_qwen.training.step import Compute, StepResult
from megatron_qwen.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplayedStep:
    """A step that was taken again.

    Args:
        iteration: which.
        loss: of the replay.
        grad_norm: of the replay.
        recorded_loss: in metrics.jsonl; None if the run has no record of the step.
        recorded_grad_norm: in metrics.jsonl.
    """

    iteration: int
    loss: float
    grad_norm: float
    recorded_loss: float | None
    recorded_grad_norm: float | None

    @property
    def equal(self) -> bool | None:
        """Whether both figures are what the run recorded, to the last digit; None if it recorded none."""
        if self.recorded_loss is None or self.recorded_grad_norm is None:
            return None
        return _equal(self.loss, self.recorded_loss) and _equal(self.grad_norm, self.recorded_grad_norm)


def replay(config: RunConfig, run_dir: Path, step: int) -> tuple[list[ReplayedStep], list[str]]:
    """Loads the newest checkpoint before a step and takes the steps up to it; called by all ranks together.

    Args:
        config: of the run; bits repeat under the layout and thread count that the run had.
        run_dir: the run.
        step: the last step to take, from 1.

    Returns:
        The steps, and the hash of every rank's weights after the last of them.

    Raises:
        ConfigError: the run has fewer steps by its configuration.
        CheckpointError: a checkpoint is damaged, or belongs to another model.
    """
    if not 1 <= step <= config.training.train_iters:
        fix = f"must be from 1 to training.train_iters={config.training.train_iters}."
        raise ConfigError(Problem("--replay", step, fix))
    directory = RunDirectory(run_dir)
    components = build_components(config)
    begun = resume(components, directory, before=step)
    if dist.get_rank() == 0:
        log.info("replaying iterations %d to %d", begun + 1, step)
    recorded, steps = recorded_steps(directory.metrics), []
    trainer = Trainer(components, [], guard=_RecordedSkips(components, recorded))
    while components.progress.iteration < step:
        result = trainer.step().result
        iteration = components.progress.iteration
        loss, grad_norm, _ = recorded.get(iteration, (None, None, False))
        steps.append(ReplayedStep(iteration, result.loss, result.grad_norm, loss, grad_norm))
    components.loader.close()
    with components.model.whole_parameters():
        held = [tensor for expert in (False, True) for tensor in weights(components, expert=expert).values()]
        own = f"{combined(fingerprints(held)) % 2**64:016x}"
    hashes = [""] * dist.get_world_size()
    dist.all_gather_object(hashes, own)
    return steps, hashes


class _RecordedSkips:
    """Skips the updates that the run skipped. It may have skipped a spike (resilience.spike_action), which depends on
    more steps than are replayed.
    """

    def __init__(self, components: TrainingComponents, recorded: dict[int, "Recorded"]) -> None:
        self._components, self._recorded, self.finding = components, recorded, dict[str, Any]()

    def before_step(self, inputs: StepInputs) -> None:
        """Nothing to note."""

    def examine(self, first: StepResult, compute: Compute) -> StepResult:
        """The step, skipped if the run skipped it."""
        *_, skipped = self._recorded.get(self._components.progress.iteration + 1, (None, None, False))
        return replace(first, skipped=first.skipped or skipped)


# Loss, gradient norm, and whether the step was skipped; figures that were not finite are null in metrics.jsonl.
Recorded = tuple[float | None, float | None, bool]


def recorded_steps(metrics: Path) -> dict[int, Recorded]:
    """What metrics.jsonl has of each iteration; nothing if there is none."""
    lines = metrics.read_bytes().splitlines() if metrics.is_file() else []
    return {
        int(record["iteration"]): (record["lm_loss"], record["grad_norm"], bool(record["skipped"]))
        for record in objects(lines)
        if "iteration" in record
    }


def describe(steps: list[ReplayedStep], hashes: list[str], *, as_json: bool) -> str:
    """The report: a line a step, or JSON."""
    if as_json:
        content: dict[str, Any] = {
            "steps": [{**asdict(step), "equal": step.equal} for step in steps],
            "weight_hashes": dict(enumerate(hashes)),
            "equal": all(step.equal for step in steps),
        }
        return json.dumps(content, indent=2)
    lines = []
    for step in steps:
        said = {True: "equal", False: "DIFFERENT", None: "not recorded"}[step.equal]
        line = f"step {step.iteration}  loss {step.loss!r}  grad {step.grad_norm!r}  {said}"
        if step.equal is False:
            line += f" (recorded: loss {step.recorded_loss!r}, grad {step.recorded_grad_norm!r})"
        lines.append(line)
    lines += [f"weights of rank {rank}: {value}" for rank, value in enumerate(hashes)]
    return "\n".join(lines)


def _equal(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)
