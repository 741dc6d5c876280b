"""Runs the loaded layer over all sequences and hands out the inputs of its modules."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from checkpoints_convert.layerwise.expert_linears import separate_experts
from checkpoints_convert.layerwise.layered_hf import HfLayers
from checkpoints_convert.layerwise.residual_stream import ResidualStream
from checkpoints_convert.layerwise.workers import Workers

TakeInput = Callable[[torch.Tensor], None]


class _AllSeen(Exception):
    """Every watched module has its input: what follows in the layer need not be computed."""


class LayerRunner:
    """A model, one layer of it in memory, over the sequences of a residual stream.

    Args:
        layers: the model.
        tokens: [sequences, length].
        stream: states in front of the layer.
        workers: threads; each computes a sequence.
        place: device of the layer.

    Attributes:
        run_seconds: spent on running layers so far.
        taking_seconds: spent on what took their inputs.
    """

    def __init__(
        self, layers: HfLayers, tokens: torch.Tensor, stream: ResidualStream, *, workers: Workers, place: torch.device
    ) -> None:
        self.layers, self.tokens, self.stream, self.workers, self.place = layers, tokens, stream, workers, place
        self.run_seconds = self.taking_seconds = 0.0
        self._local = threading.local()

    def embed(self) -> None:
        """Fills the stream with what is in front of the first layer."""
        for sequence, ids in enumerate(self.tokens):
            self.stream.write(sequence, self.layers.embed(ids))
        self.stream.advance(0)

    def load(self, index: int) -> None:
        """Brings a layer into memory, its experts as linear layers of their own."""
        self.layers.load_layer(index)
        separate_experts(self.layers.loaded)

    @torch.no_grad()
    def replace(self, module: str, weight: torch.Tensor) -> None:
        """Gives a linear of the loaded layer (``self_attn.q_proj``) another weight, [out, in]."""
        found: Any = self.layers.loaded.get_submodule(module)
        found.weight.copy_(weight)

    def watch(self, takers: Mapping[str, TakeInput]) -> None:
        """Runs the layer and gives away the inputs of modules; the stream stays in front of the layer.

        A sequence ends as soon as every watched module has its input. Inputs come sequence by sequence, whatever the
        number of workers.

        Args:
            takers: by the module's name in the layer (``mlp.experts.3.down_proj``), what takes its inputs, [n, in].
                A taker of an expert is called only for sequences of which a token is routed to it.
        """
        handles = [
            self.layers.loaded.get_submodule(name).register_forward_pre_hook(self._hook(name, len(takers)))
            for name in takers
        ]
        try:
            for group in self._groups():
                begun = time.monotonic()
                found = self.workers.map(self._inputs, group)
                self._synchronize()
                ran = time.monotonic()
                for captured in found:
                    for name, inputs in captured.items():
                        takers[name](inputs)
                self._synchronize()
                self.run_seconds += ran - begun
                self.taking_seconds += time.monotonic() - ran
        finally:
            for handle in handles:
                handle.remove()

    def advance(self, layer: int) -> None:
        """Runs the layer and moves the stream behind it, in front of ``layer``."""
        begun = time.monotonic()
        for group in self._groups():
            for sequence, hidden in zip(group, self.workers.map(self._layer, group), strict=True):
                self.stream.write(sequence, hidden)
        self.stream.advance(layer)
        self.run_seconds += time.monotonic() - begun

    def _synchronize(self) -> None:
        """Waits for the device, once for as many sequences as there are workers: the times mean something then."""
        if self.place.type != "cpu":
            torch.accelerator.synchronize(self.place)

    def _groups(self) -> list[range]:
        """As many sequences at a time as there are workers: the inputs of all of them are in memory together."""
        count, step = len(self.tokens), self.workers.count
        return [range(start, min(count, start + step)) for start in range(0, count, step)]

    def _layer(self, sequence: int) -> torch.Tensor:
        return self.layers.layer(self.stream.read(sequence).to(self.place))

    def _inputs(self, sequence: int) -> dict[str, torch.Tensor]:
        captured: dict[str, torch.Tensor] = {}
        self._local.captured = captured
        try:
            self._layer(sequence)
        except _AllSeen:
            pass  # the rest of the layer is not needed
        finally:
            self._local.captured = {}
        return captured

    def _hook(self, name: str, watched: int) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def take(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            captured: dict[str, torch.Tensor] = self._local.captured
            captured[name] = arguments[0].detach().flatten(0, -2)
            if len(captured) == watched:
                raise _AllSeen

        return take
