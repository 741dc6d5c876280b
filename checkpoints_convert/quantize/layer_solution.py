"""What a method gets of a layer, and what it makes of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.formats.quantized_linear import QuantizedLinear
from checkpoints_convert.layerwise.layer_runner import LayerRunner
from checkpoints_convert.quantize.hessian import InputStatistics
from checkpoints_convert.quantize.layer_plan import InputGroup, stages, turns
from checkpoints_convert.tensor_set import TensorSet


@dataclass
class LayerSolution:
    """A layer as it is to be written; names are those of the weights in the layer (``self_attn.q_proj.weight``).

    Args:
        linears: on their grid.
        changed: tensors that are not quantized and have other values than the source's, in the source's dtype.
        untouched: experts' linears that no token of the calibration data reached; they are rounded to nearest.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    untouched: list[str] = field(default_factory=list)


class CalibratedLayer:
    """The layer that a runner has loaded, for a method.

    Args:
        index: of the layer.
        source: the model.
        runner: has the layer in memory.
        budget: bytes for Hessians.
    """

    def __init__(self, index: int, source: TensorSet, runner: LayerRunner, *, budget: int) -> None:
        self.index, self.runner, self.workers, self._source = index, runner, runner.workers, source
        self._prefix, self._budget = f"model.layers.{index}.", budget
        self.names = [name.removeprefix(self._prefix) for name in source.tensors if name.startswith(self._prefix)]

    @cached_property
    def stages(self) -> list[list[InputGroup]]:
        """Quantized linears by input, in the order of the layer."""
        quantized = [name for name in self.names if is_quantized(self._prefix + name)]
        return stages((name.removesuffix(".weight"), self.shape(name)[1]) for name in quantized)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.tensors[self._prefix + name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Format of a tensor in the source."""
        return self._source.tensors[self._prefix + name].dtype

    def weight(self, name: str) -> torch.Tensor:
        """A tensor of the source, float32, on the device that computes."""
        return self._source.rows(self._prefix + name, 0, self.shape(name)[0]).to(self.runner.place, torch.float32)

    def statistics(
        self, groups: Sequence[InputGroup], *, hessian: bool
    ) -> Iterator[list[tuple[InputGroup, InputStatistics]]]:
        """Statistics of the inputs of groups; Hessians in turns, each a pass over all sequences."""
        for turn in turns(groups, budget=self._budget) if hessian else [list(groups)]:
            found = [
                InputStatistics(group.columns, hessian=hessian, workers=self.workers, place=self.runner.place)
                for group in turn
            ]
            self.runner.watch({group.watched: statistics.add for group, statistics in zip(turn, found, strict=True)})
            yield list(zip(turn, found, strict=True))

    def module_statistics(self, modules: dict[str, int]) -> dict[str, InputStatistics]:
        """Statistics without Hessian of the inputs of modules; by name, their width."""
        found = {
            name: InputStatistics(width, hessian=False, workers=self.workers, place=self.runner.place)
            for name, width in modules.items()
        }
        self.runner.watch({name: statistics.add for name, statistics in found.items()})
        return found
