"""RunConfig: all sections of a run's configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_qwen.config.checkpoint import CheckpointConfig
from megatron_qwen.config.evaluation import EvaluationConfig
from megatron_qwen.config.fields import FieldInfo, field_infos
from megatron_qwen.config.lora import LoraConfig
from megatron_qwen.config.objective import ObjectiveConfig
from megatron_qwen.config.resilience import ResilienceConfig
from megatron_qwen.config.sections import (
    DataConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PerformanceConfig,
    PrecisionConfig,
    RopeConfig,
    TrainingConfig,
)

SECTION_TYPES: dict[str, type] = {
    "model": ModelConfig,
    "rope": RopeConfig,
    "parallel": ParallelConfig,
    "precision": PrecisionConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "training": TrainingConfig,
    "objective": ObjectiveConfig,
    "lora": LoraConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "metrics": MetricsConfig,
    "resilience": ResilienceConfig,
    "performance": PerformanceConfig,
}
# Fields that name a file or a directory.
PATHS = {"data": ("path", "blend", "tokenizer"), "evaluation": ("task_dir",), "checkpoint": ("load", "branch_from")}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sections that decide what a model computes from its weights, which a Hugging Face config.json holds too."""

    model: ModelConfig
    rope: RopeConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete configuration of a run, which run.yaml holds in resolved form."""

    recipe: str
    model: ModelConfig
    rope: RopeConfig = field(default_factory=RopeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)

    @property
    def architecture(self) -> Architecture:
        """What the run's model computes."""
        return Architecture(model=self.model, rope=self.rope)

    def with_section(self, section: str, /, **changes: Any) -> "RunConfig":
        """A copy with some fields of one section replaced."""
        return replace(self, **{section: replace(getattr(self, section), **changes)})


def all_fields() -> dict[str, FieldInfo]:
    """Every field of every section by its path, ``section.field``."""
    return {info.path: info for section, cls in SECTION_TYPES.items() for info in field_infos(section, cls).values()}


def with_paths(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """A copy with every path that is set replaced by ``change(path)``."""
    for section, names in PATHS.items():
        values = {name: getattr(getattr(config, section), name) for name in names}
        given = {name: change(value) for name, value in values.items() if value is not None}
        config = config.with_section(section, **given)
    return config


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain YAML values, sections in their order."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    sections = {
        name: {item.name: plain(getattr(getattr(config, name), item.name)) for item in fields(cls)}
        for name, cls in SECTION_TYPES.items()
    }
    return {"recipe": config.recipe, **sections}
