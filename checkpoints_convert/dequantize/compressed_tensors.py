"""The formats of the compressed-tensors library that llm-compressor writes and vLLM reads.

``pack-quantized`` has integer codes in words, ``int-quantized`` int8 and ``float-quantized`` e4m3 in the place of the
weight, each with weight_scale next to it. Source: compressed-tensors 0.20, its compressors and quantization arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints_convert.dequantize.directory_format import SCALE_DTYPES, Part, QuantizedWeight, Scheme
from checkpoints_convert.dequantize.fp8 import block_layout
from checkpoints_convert.dequantize.module_names import ModuleNames
from checkpoints_convert.dequantize.packed_weight import PackedWeight
from checkpoints_convert.dequantize.packing import WORD
from checkpoints_convert.dequantize.scale_layout import ScaleLayout
from checkpoints_convert.dequantize.scaled_weight import ScaledWeight
from checkpoints_convert.dequantize.settings import Settings
from checkpoints_convert.dequantize.stored import StoredTensors
from checkpoints_convert.safetensors_format import StoredEntry

_PACKED, _INTEGER, _FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_LARGEST_GROUP = 1 << 20
_REGULAR_EXPRESSION = "re:"
_WITHOUT_ORDER, _WITH_ORDER = (None, False, "weight", "static"), (True, "group", "dynamic")


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """One of the library's formats with the parameters of a config.json.

    Args:
        kind: its name in config.json.
        bits: of a code.
        layout: of the scales.
        symmetric: whether there are no zero points.
        act_order: whether columns may have any group.
        inputs: how a program rounds a layer's inputs; None: not at all.
        left_out: modules that stay as they are.
    """

    kind: str
    bits: int
    layout: ScaleLayout
    symmetric: bool
    act_order: bool
    inputs: str | None
    left_out: ModuleNames

    @classmethod
    def read(cls, settings: Settings) -> "CompressedTensorsFormat | None":
        """From ``quantization_config``; problems go to the settings. None where too little is right to go on."""
        settings.choice("quantization_status", ("compressed",), default="compressed")
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if settings.get(name) not in (None, {}, {"format": "dense"}):
                settings.wrong(name, settings.get(name), "is not supported; must be null.")
        groups = settings.section("config_groups")
        if groups is None:
            return None
        told: dict[str, Any] = settings.get("config_groups")
        if len(told) != 1:
            settings.wrong("config_groups", f"{len(told)} groups", "must be one group: mixed ones are not supported.")
            return None
        group = groups.section(next(iter(told)))
        weights = None if group is None else group.section("weights")
        if group is None or weights is None:
            return None
        if group.get("targets") != ["Linear"]:
            group.wrong("targets", group.get("targets"), 'is not supported; must be ["Linear"], the rest in "ignore".')
        if group.get("output_activations") is not None:
            group.wrong("output_activations", group.get("output_activations"), "is not supported; must be null.")
        kind = (group if group.get("format") is not None else settings).choice("format", (_PACKED, _INTEGER, _FLOAT))
        return cls._of_weights(kind, weights, inputs=_inputs(group), left_out=_left_out(settings))

    @classmethod
    def _of_weights(
        cls, kind: str, weights: Settings, *, inputs: str | None, left_out: ModuleNames
    ) -> "CompressedTensorsFormat":
        weights.choice("type", ("float",) if kind == _FLOAT else ("int",))
        weights.choice("dynamic", (False,), default=False)
        order = weights.get("actorder")
        if not any(order is one or order == one for one in (*_WITHOUT_ORDER, *_WITH_ORDER)):
            weights.wrong("actorder", order, "must be null, weight or group.")
        return cls(
            kind=kind,
            bits=weights.choice("num_bits", (4, 8) if kind == _PACKED else (8,)),
            layout=_layout(kind, weights),
            symmetric=weights.choice("symmetric", (True,) if kind == _FLOAT else (True, False), default=True),
            act_order=kind == _PACKED and order in _WITH_ORDER,
            inputs=inputs,
            left_out=left_out,
        )

    @property
    def scheme(self) -> Scheme:
        """For people, and for the limits of a comparison."""
        height, width = self.layout.height, self.layout.width
        told: dict[str, Any] = {"format": self.kind}
        if height is None:
            told["scale"] = "one a tensor"
        elif width is None:
            told["scale"] = "one a row"
        elif height == 1:
            told |= {"group": width, "act-order": self.act_order}
        else:
            told["block"] = f"{height} x {width}"
        if self.kind != _FLOAT:
            told["symmetric"] = self.symmetric
        precision = "fp8" if self.kind == _FLOAT else f"int{self.bits}"
        # llm-compressor puts SmoothQuant before int8 inputs, and AWQ's scales before this packing; neither leaves a
        # trace in config.json.
        return Scheme("compressed-tensors", precision, told, may_fold=self.kind != _FLOAT, inputs=self.inputs)

    def is_quantized(self, parts: Mapping[str, StoredEntry]) -> bool:
        """Whether there are scales, codes, or values that are not what a weight's dtype can be."""
        narrow = "weight" in parts and parts["weight"].dtype in (torch.int8, torch.float8_e4m3fn)
        return narrow or any(part in parts for part in ("weight_packed", "weight_scale", "weight_shape"))

    def shape_fault(self, shape: tuple[int, int]) -> None:
        """Any shape fits: the last word and the last group may be smaller."""

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Codes, scales, and what there is besides."""
        found = {"weight_scale": Part(self.layout.shapes(shape), SCALE_DTYPES)}
        if self.kind != _PACKED:
            found["weight"] = Part((shape,), (torch.int8 if self.kind == _INTEGER else torch.float8_e4m3fn,))
            if not self.symmetric:
                found["weight_zero_point"] = Part(self.layout.shapes(shape), (torch.int8,))
            # Of inputs whose scale is fixed.
            found["input_scale"] = Part(((), (1,)), SCALE_DTYPES, optional=True)
            found["input_zero_point"] = Part(((), (1,)), (torch.int8, torch.float8_e4m3fn), optional=True)
            return found
        (rows, columns), per_word = shape, WORD // self.bits
        found["weight_packed"] = Part(((rows, -(-columns // per_word)),), (torch.int32,))
        found["weight_shape"] = Part(((2,),), (torch.int64, torch.int32))
        if not self.symmetric:
            words = (-(-rows // per_word), self.layout.grid(shape)[1])
            found["weight_zero_point"] = Part((words,), (torch.int32,))
        if self.act_order:
            found["weight_g_idx"] = Part(((columns,),), (torch.int32,))
        return found

    def open(self, stored: StoredTensors, module: str, shape: tuple[int, int]) -> QuantizedWeight:
        """A weight whose parts were found right."""
        if self.kind == _PACKED:
            return PackedWeight(stored, module, shape, self.bits, self.layout, self.symmetric, self.act_order)
        zero = None if self.symmetric else "weight_zero_point"
        return ScaledWeight(stored, module, shape, self.layout, scale="weight_scale", zero_point=zero)


def _layout(kind: str, weights: Settings) -> ScaleLayout:
    strategies = {
        _PACKED: ("group", "channel"),
        _INTEGER: ("channel", "tensor", "group"),
        _FLOAT: ("channel", "tensor", "block", "group"),
    }
    strategy = weights.choice("strategy", strategies[kind])
    if strategy == "group":
        return ScaleLayout(1, weights.whole("group_size", low=1, high=_LARGEST_GROUP))
    if strategy == "block":
        return block_layout(weights, "block_structure")
    return ScaleLayout(1, None) if strategy == "channel" else ScaleLayout(None, None)


def _inputs(group: Settings) -> str | None:
    """How the inputs of a layer are rounded; it does not change what the weights are."""
    section = group.section("input_activations", required=False)
    if section is None:
        return None
    kind, bits = section.choice("type", ("int", "float")), section.whole("num_bits", low=4, high=8)
    dynamic = section.choice("dynamic", (True, False), default=False)
    return f"{kind}{bits}, {'dynamic' if dynamic else 'static'}"


def _left_out(settings: Settings) -> ModuleNames:
    told = settings.names("ignore")
    patterns = [one.removeprefix(_REGULAR_EXPRESSION) for one in told if one.startswith(_REGULAR_EXPRESSION)]
    return ModuleNames([one for one in told if not one.startswith(_REGULAR_EXPRESSION)], patterns)
