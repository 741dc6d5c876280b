"""The model that is calibrated, whatever it is read from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints_convert.checkpoint_source import CheckpointSource
from checkpoints_convert.exported_config import exported_config
from checkpoints_convert.hf_directory import HfDirectory
from checkpoints_convert.tensor_set import ExportedWeights, TensorSet


@dataclass(frozen=True)
class CalibrationSource:
    """A model under Hugging Face names.

    Args:
        weights: its tensors; of another shape than the files' where they are padded on the way.
        config: its config.json, which agrees with these shapes.
        digest: what tells it from every other model.
    """

    weights: TensorSet
    config: Mapping[str, Any]
    digest: str

    @property
    def layers(self) -> int:
        """Its layers."""
        return int(self.config["num_hidden_layers"])


def calibration_source(source: CheckpointSource | HfDirectory) -> CalibrationSource:
    """A checkpoint or a directory, ready to be calibrated.

    Raises:
        ConversionError: no class of the family can express the architecture of a checkpoint.
        DataError: the tokenizer of a checkpoint cannot be read.
    """
    if isinstance(source, HfDirectory):
        assert source.config is not None
        return CalibrationSource(source, source.config, source.digest())
    return CalibrationSource(ExportedWeights(source.weights), exported_config(source, dtype="float32"), source.digest())
