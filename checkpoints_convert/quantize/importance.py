"""Importance of a weight's columns for GGUF: mean squared inputs, as llama.cpp's imatrix sums them.

llama.cpp, tools/imatrix/imatrix.cpp: x^2 summed over tokens and divided by their number, for every matrix but the
output's; of experts over the tokens that are routed to each.
"""

from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.quantize.calibrate import layers_identity, solve_layers
from checkpoints_convert.quantize.calibration_data import Samples
from checkpoints_convert.quantize.calibration_options import CalibrationOptions
from checkpoints_convert.quantize.calibration_progress import TakeProgress
from checkpoints_convert.quantize.calibration_source import CalibrationSource
from checkpoints_convert.quantize.layer_solution import CalibratedLayer, LayerSolution
from checkpoints_convert.quantize.solved_store import SolvedStore

_PART = "importance"


class Importances:
    """Importances of a model, read from its store as they are asked for.

    Args:
        store: of ``importances``.
    """

    def __init__(self, store: SolvedStore) -> None:
        self._store = store

    def column(self, name: str) -> torch.Tensor:
        """Of the columns of a weight by its Hugging Face name, float32 [in]; ones if no token reached the expert."""
        found = self._store.changed(name)
        assert found is not None, name
        return found


def importances(
    source: CalibrationSource,
    *,
    samples: Samples,
    options: CalibrationOptions,
    work: Path,
    progress: TakeProgress | None = None,
) -> Importances:
    """Sums the importances of all quantized weights, layer by layer.

    Args:
        source: the model.
        samples: calibration data.
        options: ``dtype`` and what it may take.
        work: directory for what is done.
        progress: told of every layer; None shows it on stderr.

    Raises:
        ConfigError: an option is out of range.
        ConversionError: ``work`` has importances of other data or of another model.
    """

    def solve(layer: CalibratedLayer) -> LayerSolution:
        return LayerSolution(changed=layer_importances(layer))

    store = solve_layers(
        source, _PART, {}, solve, False, samples=samples, options=options, work=work, progress=progress
    )
    return Importances(store)


def importance_identity(source: CalibrationSource, options: CalibrationOptions, samples: Samples) -> dict[str, Any]:
    """Everything that determines what ``importances`` gives; it is known before they are."""
    return layers_identity(source, _PART, {}, options, samples)


def layer_importances(layer: CalibratedLayer) -> dict[str, torch.Tensor]:
    """Mean squared inputs of the quantized weights of a layer, float32 [in], by name in the layer."""
    groups = [group for stage in layer.stages for group in stage]
    found: dict[str, torch.Tensor] = {}
    for turn in layer.statistics(groups, hessian=False):
        for group, statistics in turn:
            squares = statistics.mean_square if statistics.tokens else torch.ones(group.columns)
            found |= {f"{name}.weight": squares.cpu().clone() for name in group.linears}
    return found
