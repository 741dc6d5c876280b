"""Fine-grained FP8 as DeepSeek-V3 and Qwen3 were released: e4m3 values, and a scale for a block of 128 x 128.

A weight of [out, in] keeps its name with dtype float8_e4m3fn; weight_scale_inv float32 [ceil out / 128, ceil in / 128]
is what a block is multiplied by. Source: DeepSeek-V3's weight_dequant, transformers' fine-grained FP8.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from checkpoints_convert.dequantize.directory_format import SCALE_DTYPES, Part, Scheme
from checkpoints_convert.dequantize.module_names import ModuleNames
from checkpoints_convert.dequantize.scale_layout import ScaleLayout
from checkpoints_convert.dequantize.scaled_weight import ScaledWeight
from checkpoints_convert.dequantize.settings import Settings
from checkpoints_convert.dequantize.stored import StoredTensors
from checkpoints_convert.safetensors_format import StoredEntry

_SCALE, _INPUT_SCALE = "weight_scale_inv", "input_scale"
_BLOCK_FIELD = "weight_block_size"
_LARGEST_BLOCK = 1 << 20


@dataclass(frozen=True)
class BlockFp8Format:
    """Fine-grained FP8 with the parameters of a config.json.

    Args:
        layout: of the scales.
        dynamic: whether inputs get their scales when the model runs.
        left_out: modules that stay as they are.
    """

    layout: ScaleLayout
    dynamic: bool
    left_out: ModuleNames

    @classmethod
    def read(cls, settings: Settings) -> "BlockFp8Format":
        """From ``quantization_config``; problems go to the settings."""
        settings.choice("fmt", ("e4m3",), default="e4m3")
        dynamic = settings.choice("activation_scheme", ("dynamic", "static"), default="dynamic") == "dynamic"
        layout = block_layout(settings, _BLOCK_FIELD)
        left_out = settings.names("modules_to_not_convert") + settings.names("ignored_layers")
        return cls(layout, dynamic, ModuleNames(left_out))

    @property
    def scheme(self) -> Scheme:
        """For people, and for the limits of a comparison."""
        block = f"{self.layout.height} x {self.layout.width}"
        return Scheme("fp8", "fp8", {"block": block}, inputs=f"e4m3, {'dynamic' if self.dynamic else 'static'}")

    def is_quantized(self, parts: Mapping[str, StoredEntry]) -> bool:
        """Whether there are scales, or values of FP8."""
        return _SCALE in parts or ("weight" in parts and parts["weight"].dtype == torch.float8_e4m3fn)

    def shape_fault(self, shape: tuple[int, int]) -> None:
        """Any shape fits: the last blocks may be smaller."""

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Values and scales; static inputs have one too."""
        return {
            "weight": Part((shape,), (torch.float8_e4m3fn,)),
            _SCALE: Part(self.layout.shapes(shape), SCALE_DTYPES),
            _INPUT_SCALE: Part(((), (1,)), SCALE_DTYPES, optional=True),
        }

    def open(self, stored: StoredTensors, module: str, shape: tuple[int, int]) -> ScaledWeight:
        """A weight whose parts were found right."""
        return ScaledWeight(stored, module, shape, self.layout, scale=_SCALE)


def block_layout(settings: Settings, name: str) -> ScaleLayout:
    """The scales' layout where a field gives rows and columns of a block."""
    value = settings.get(name)
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, int) and not isinstance(one, bool) and 1 <= one <= _LARGEST_BLOCK for one in value)
    ):
        return ScaleLayout(*value)
    settings.wrong(name, value, f"must be two whole numbers from 1 to {_LARGEST_BLOCK:,}, such as [128, 128].")
    return ScaleLayout(1, 1)
