"""Small sources whose tokens say where they lie, and runs over them."""

from pathlib import Path
from typing import Any

import yaml

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.token_files.token_file import TokenFileWriter
from megatron_qwen.recipes.registry import RECIPES

VOCABULARY = 4096


def write_source(prefix: Path, total: int, *, document: int = 37) -> Path:
    """A token file of 0, 1, 2 .. total - 1, in documents of a length."""
    with TokenFileWriter(prefix, vocab_size=VOCABULARY) as writer:
        for start in range(0, total, document):
            writer.add(range(start, min(start + document, total)))
    return prefix


def run_config(folder: Path, blend: dict[str, Any], **overrides: Any) -> RunConfig:
    """A run over a blend; ``overrides`` are fields of its data and training sections."""
    path = folder / "blend.yaml"
    path.write_text(yaml.safe_dump(blend))
    config = RECIPES["tiny_dense"]().with_section("model", vocab_size=VOCABULARY)
    data = {name: value for name, value in overrides.items() if hasattr(config.data, name)}
    training = {name: value for name, value in overrides.items() if name not in data}
    fields = {"seq_length": 16, "validation_fraction": 0.0, **data, "blend": str(path)}
    return config.with_section("data", **fields).with_section("training", **training)


def open_run(folder: Path, blend: dict[str, Any], **overrides: Any) -> TrainingData:
    """Its data."""
    return TrainingData(run_config(folder, blend, **overrides))
