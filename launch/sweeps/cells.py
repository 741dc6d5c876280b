"""The cells of a study: every model, horizon, learning rate, batch and seed, with what each is and costs.

Under wsd the horizons of one model and setting are branches of one stem: it trains at the constant rate to the last
branching point, and each horizon decays from its own (Hu et al., arXiv 2404.06395; Haegele et al., arXiv 2405.18392).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launch.sweeps.study import StudyFile
from megatron_qwen.config.checks import problems
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.estimate.layouts import layouts
from megatron_qwen.estimate.memory import memory_per_stage
from tools.scaling.ladder import ModelShape, shape_near, shape_of


@dataclass(frozen=True)
class Placed:
    """A model with a batch, placed on the study's devices.

    Args:
        shape: the model.
        config: the run, without what a cell adds.
        sequences: of a step.
        tokens_per_second: of all devices.
        memory_gib: of the fullest device.
        why_not: why it cannot run; None where it can.
    """

    shape: ModelShape
    config: RunConfig
    sequences: int
    tokens_per_second: float
    memory_gib: float
    why_not: str | None = None


@dataclass(frozen=True)
class Cell:
    """One trained model.

    Args:
        name: unique in the study.
        placed: model, batch and devices.
        learning_rate: the peak.
        seed: of weights and data.
        horizon: number of the horizon, from 0.
        iterations: of the whole run.
        warmup: iterations.
        decay: iterations of the final decay; 0 under cosine.
        stem: name of the run that it branches off; None under cosine.
    """

    name: str
    placed: Placed
    learning_rate: float
    seed: int
    horizon: int
    iterations: int
    warmup: int
    decay: int
    stem: str | None

    @property
    def tokens(self) -> int:
        """D: tokens seen from the first step on."""
        return self.iterations * self.step_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.placed.sequences * self.placed.config.data.seq_length

    @property
    def branch_point(self) -> int:
        """Iteration of the stem at which it begins; 0 where it has none."""
        return 0 if self.stem is None else self.iterations - self.decay

    @property
    def own_tokens(self) -> int:
        """Tokens that this cell itself trains on."""
        return (self.iterations - self.branch_point) * self.step_tokens

    def config(self) -> RunConfig:
        """The run as ``mq train`` takes it; a branch resumes from its stem."""
        optim: dict[str, Any] = {"learning_rate": self.learning_rate, "lr_warmup_iters": self.warmup}
        share = self.placed.config.optim.min_learning_rate / self.placed.config.optim.learning_rate
        optim["min_learning_rate"] = self.learning_rate * share
        optim |= {"lr_decay_iters": None, "lr_decay_style": "cosine" if self.stem is None else "wsd"}
        if self.stem is not None:
            optim["lr_wsd_decay_iters"] = self.decay
        config = self.placed.config.with_section("optim", **optim)
        return config.with_section("training", train_iters=self.iterations, seed=self.seed)


@dataclass(frozen=True)
class Stem:
    """What the branches of one model and setting share.

    Args:
        name: unique in the study.
        branches: its cells, the shortest first.
    """

    name: str
    branches: tuple[Cell, ...]

    @property
    def iterations(self) -> int:
        """Up to the last branching point."""
        return max(cell.branch_point for cell in self.branches)

    @property
    def tokens(self) -> int:
        """Tokens it trains on."""
        return self.iterations * self.branches[0].step_tokens


def shapes(study: StudyFile) -> list[ModelShape]:
    """The ladder, small to large.

    Raises:
        ConfigError: two rungs are the same model, or one is illegal.
    """
    found = [shape_near(study.base, params) for params in study.params]
    found += [shape_of(replace(study.base.model, **model)) for model in study.models]  # type: ignore[arg-type]
    wrong = []
    seen: dict[object, ModelShape] = {}
    for shape in found:
        if shape.model in seen:
            fix = "stands for two shapes that are nearly equal; space params further apart."
            wrong.append(Problem("shapes", f"{shape.name}, {shape.params:.3g} parameters", fix))
        seen[shape.model] = shape
        single = _single(study.base, shape)
        wrong += [
            Problem(f"shapes: {shape.name}: {one.where}", one.value, one.fix) for one in problems(single, world_size=1)
        ]
    if wrong:
        raise ConfigError(wrong)
    return sorted(found, key=lambda shape: shape.params)


def _single(base: RunConfig, shape: ModelShape) -> RunConfig:
    alone: dict[str, Any] = {
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
    }
    config = replace(base, recipe="custom", model=shape.model).with_section("parallel", **alone)
    return config.with_section("training", micro_batch_size=1)


def place(study: StudyFile, shape: ModelShape, batch_tokens: float) -> Placed:
    """A model and a batch on the study's devices: the planner's layout, or data parallelism at a measured rate."""
    count, length = study.device.count, study.base.data.seq_length
    wanted = batch_tokens / length
    shared = count if wanted >= count else 1 << int(math.log2(max(1.0, wanted)))
    sequences = max(1, round(wanted / shared)) * shared
    config = _single(study.base, shape).with_section("training", global_batch_size=sequences)
    if study.device.kind is not None:
        found, rejected = layouts(config, world_size=count, device=study.device.kind)
        if not found:
            least = min(
                (one for one in rejected if one.need_gib is not None), key=lambda one: one.need_gib or 0.0, default=None
            )
            reason = (least or rejected[0]).reason if rejected else "no layout is legal."
            return Placed(shape, config, sequences, 0.0, 0.0, reason)
        best = found[0]
        return Placed(shape, best.config, sequences, best.tokens_per_second * count, best.memory_gib)
    if sequences % count:
        return Placed(
            shape,
            config,
            sequences,
            0.0,
            0.0,
            f"{sequences} sequences per step cannot be divided among {count} devices.",
        )
    assert study.device.tflops is not None
    micro = max(size for size in (1, 2, 4, 8, 16, 32) if (sequences // count) % size == 0)
    config = config.with_section("training", micro_batch_size=micro)
    memory = memory_per_stage(config, world_size=count, backend="torch", gpu=False)[0]
    gib = memory.state_gib + (memory.activations + memory.loss) / 2**30
    too_large = None
    if study.device.memory_gib is not None and gib > study.device.memory_gib:
        too_large = f"needs {gib:.1f} GiB of {study.device.memory_gib:.1f}."
    speed = study.device.tflops * 1e12 * count / training_flops_per_token(shape.model, length)
    return Placed(shape, config, sequences, speed, gib, too_large)


def cells(study: StudyFile, placed: list[Placed]) -> Iterator[Cell]:
    """All cells of models that can run."""
    for one in placed:
        if one.why_not is not None:
            continue
        horizons = _horizons(study, one)
        warmup = max(1, round(study.warmup_share * horizons[0]))
        for rate in study.learning_rates:
            for seed in study.seeds:
                stem = f"{one.shape.name}_b{one.sequences}_lr{rate:.3g}_s{seed}".replace("+", "")
                for number, iterations in enumerate(horizons):
                    wsd = study.schedule == "wsd"
                    decay = max(1, round(study.decay_share * iterations)) if wsd else 0
                    yield Cell(
                        f"{stem}_t{number}", one, rate, seed, number, iterations, warmup, decay, stem if wsd else None
                    )


def _horizons(study: StudyFile, placed: Placed) -> list[int]:
    """Iterations of every horizon, the shortest first."""
    step = placed.sequences * placed.config.data.seq_length
    tokens = study.tokens or tuple(factor * placed.shape.params for factor in study.tokens_per_param)
    return sorted(max(2, round(one / step)) for one in tokens)


def stems(found: list[Cell]) -> list[Stem]:
    """The stems that these cells branch off."""
    members: dict[str, list[Cell]] = {}
    for cell in found:
        if cell.stem is not None:
            members.setdefault(cell.stem, []).append(cell)
    return [Stem(name, tuple(sorted(each, key=lambda cell: cell.iterations))) for name, each in members.items()]
