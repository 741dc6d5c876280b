"""Scales of a linear's input channels, folded into what computes these channels, so that no operation is added.

With W x = (W diag(s)) (diag(1 / s) x): columns of what reads x are multiplied by s, and the norm, or the rows of the
linear, that makes x are divided by it. The model computes the same function.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from checkpoints_convert.quantize.layer_solution import CalibratedLayer


@dataclass(frozen=True)
class Fold:
    """Channels that can be scaled.

    Args:
        producer: module whose output channels are divided: a norm, or a linear with or without bias.
        watched: module whose input they are.
        columns: how many there are.
        linears: quantized linears that read them.
        others: other weights that read them: a router, a gate of a shared expert.
    """

    producer: str
    watched: str
    columns: int
    linears: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def is_norm(self) -> bool:
        """Whether a norm makes the channels."""
        return self.producer.endswith("layernorm")


def folds(layer: CalibratedLayer) -> list[Fold]:
    """All channels of a layer that can be scaled.

    v_proj makes the channels of o_proj one to one only where every query head has a key-value head of its own.
    """
    attention, output, *_ = layer.stages
    hidden = attention[0].columns
    found = [Fold("input_layernorm", attention[0].watched, hidden, attention[0].linears)]
    if layer.shape("self_attn.v_proj.weight")[0] == output[0].columns:
        found.append(Fold("self_attn.v_proj", output[0].watched, output[0].columns, output[0].linears))
    reading = tuple(name for group in layer.stages[2] for name in group.linears)
    others = tuple(name for name in ("mlp.gate.weight", "mlp.shared_expert_gate.weight") if name in layer.names)
    found.append(Fold("post_attention_layernorm", "mlp", hidden, reading, others))
    for group in layer.stages[3]:
        up = group.linears[0].replace("down_proj", "up_proj")
        found.append(Fold(up, group.watched, group.columns, group.linears))
    return found


class FoldedWeights:
    """A layer's weights with scales folded in, float32.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: CalibratedLayer) -> None:
        self._layer = layer
        self._rows: dict[str, torch.Tensor] = {}
        self._columns: dict[str, torch.Tensor] = {}
        self._others: dict[str, torch.Tensor] = {}

    def apply(self, fold: Fold, scales: torch.Tensor) -> torch.Tensor:
        """Folds scales, [columns], and returns those that were folded.

        A norm's weight is rounded to the source's format; the scale is then the quotient of the two, so that the
        columns make up for the rounding.
        """
        if fold.is_norm:
            name = f"{fold.producer}.weight"
            before = self._layer.weight(name)
            after = (before / scales).to(self._layer.dtype(name))
            usable = (after != 0) & after.isfinite()
            scales = torch.where(usable, before / after.float(), 1.0)
            self._others[name] = torch.where(usable, after, before.to(after.dtype))
        else:
            self._rows[fold.producer] = scales
            if (bias := f"{fold.producer}.bias") in self._layer.names:
                self._others[bias] = (self._layer.weight(bias) / scales).to(self._layer.dtype(bias))
        for linear in fold.linears:
            self._columns[linear] = scales
        for name in fold.others:
            self._others[name] = (self._layer.weight(name) * scales).to(self._layer.dtype(name))
        return scales

    def linear(self, name: str) -> torch.Tensor:
        """A linear's weight, float32 [out, in]."""
        weight = self._layer.weight(f"{name}.weight")
        if (rows := self._rows.get(name)) is not None:
            weight = weight / rows[:, None]
        if (columns := self._columns.get(name)) is not None:
            weight = weight * columns
        return weight

    def input_scales(self, name: str) -> torch.Tensor | None:
        """What a linear's inputs are divided by, [in]; None where they are as they were."""
        return self._columns.get(name)

    @property
    def changed(self) -> Mapping[str, torch.Tensor]:
        """Tensors that are not quantized and were changed, by name, in the source's formats."""
        return {name: value.cpu() for name, value in self._others.items()}
