"""The formats of compressed-tensors: int4 in groups, int8 and FP8 per row, https://github.com/vllm-project/compressed-tensors

- ``w4a16`` (pack-quantized): ``weight_packed`` int32 [out, in / 8], value + 8, the first input in the lowest bits;
  ``weight_scale`` [out, groups]; ``weight_shape`` int64 [2].
- ``w8a8`` (int-quantized): ``weight`` int8, ``weight_scale`` [out, 1]; inputs are rounded token by token.
- ``fp8`` (float-quantized): ``weight`` e4m3, ``weight_scale`` [out, 1], or [ceil(out / 128), ceil(in / 128)].

A weight is q * s. Scales are bf16, as llm-compressor writes them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints_convert.encoding import SAME_NAME, EncodedTensor, Encoding
from checkpoints_convert.formats.fp8 import BLOCK, Fp8Blocks, Fp8Rows
from checkpoints_convert.formats.grid_encoding import GridEncoding
from checkpoints_convert.formats.kept_modules import grid_shape_problem, kept_modules
from checkpoints_convert.formats.parts import Parts
from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from checkpoints_convert.formats.words import codes_of_a_word, pack_words
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import Problem

# Of the library, whose description of the formats this is.
_VERSION = "0.20.1"
_SCALE, _SCALE_DTYPE = "weight_scale", torch.bfloat16


@dataclass(frozen=True)
class W4A16:
    """int4 weights in groups; inputs as they are.

    Args:
        group: inputs that share a scale.
    """

    group: int = 128

    @property
    def name(self) -> str:
        """``w4a16``."""
        return "w4a16"

    @property
    def grid(self) -> Grid:
        """Symmetric groups of inputs."""
        return Grid(4, self.group, True, _SCALE_DTYPE)

    def encoding(self) -> GridEncoding:
        """Rounds to nearest."""
        return GridEncoding(self, 1)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        """The three tensors of a layer of [out, in]."""
        rows, columns = shape
        return {
            "weight_packed": EncodedTensor((rows, columns // codes_of_a_word(4)), torch.int32),
            _SCALE: EncodedTensor((rows, self.grid.groups(columns)), _SCALE_DTYPE),
            "weight_shape": EncodedTensor((2,), torch.int64, lambda: torch.tensor(shape)),
        }

    def packed(self, codes: Callable[[], torch.Tensor], scales: torch.Tensor, zeros: torch.Tensor) -> Parts:
        """Those of them that are made of rows. A code is the value + 8 already: 8 is the zero of a symmetric grid."""
        return Parts({"weight_packed": lambda: pack_words(codes(), 4), _SCALE: lambda: scales.to(_SCALE_DTYPE)})

    def pack(self, linear: QuantizedLinear) -> Mapping[str, torch.Tensor]:
        """All three."""
        assert linear.group_of is None, "groups of w4a16 are consecutive: compressed-tensors gives up other orders"
        shape = torch.tensor(linear.codes.shape)
        return self.packed(lambda: linear.codes, linear.scales, linear.zeros).also({"weight_shape": lambda: shape})

    def shape_problem(self, name: str, shape: tuple[int, int]) -> Problem | None:
        """Inputs that are no whole groups."""
        return grid_shape_problem(name, shape, self.grid, words_along_rows=False)

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """As llm-compressor writes it."""
        weights = _arguments(num_bits=4, type_="int", strategy="group", group_size=self.group)
        return _config(model, format_="pack-quantized", weights=weights, inputs=None)

    def files(self, model: ModelConfig) -> dict[str, str]:
        """None."""
        return {}


@dataclass(frozen=True)
class W8A8:
    """int8 weights with a scale per row, and int8 inputs with a scale per token."""

    @property
    def name(self) -> str:
        """``w8a8``."""
        return "w8a8"

    @property
    def grid(self) -> Grid:
        """Whole rows, symmetric."""
        return Grid(8, None, True, _SCALE_DTYPE)

    def encoding(self) -> GridEncoding:
        """Rounds to nearest."""
        return GridEncoding(self, 1)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        """Values and scales of a layer of [out, in]."""
        return {SAME_NAME: EncodedTensor(shape, torch.int8), _SCALE: EncodedTensor((shape[0], 1), _SCALE_DTYPE)}

    def packed(self, codes: Callable[[], torch.Tensor], scales: torch.Tensor, zeros: torch.Tensor) -> Parts:
        """Both: code - 128 in int8 is the code with its highest bit turned."""
        return Parts({SAME_NAME: lambda: (codes() ^ 128).view(torch.int8), _SCALE: lambda: scales.to(_SCALE_DTYPE)})

    def pack(self, linear: QuantizedLinear) -> Mapping[str, torch.Tensor]:
        """Both."""
        made = self.packed(lambda: linear.codes, linear.scales, linear.zeros)
        return Parts({"weight": lambda: made[SAME_NAME], _SCALE: lambda: made[_SCALE]})

    def shape_problem(self, name: str, shape: tuple[int, int]) -> Problem | None:
        """None: any width can be held."""
        return None

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """As llm-compressor writes it."""
        weights = _arguments(num_bits=8, type_="int", strategy="channel")
        inputs = _arguments(num_bits=8, type_="int", strategy="token", dynamic=True)
        return _config(model, format_="int-quantized", weights=weights, inputs=inputs)

    def files(self, model: ModelConfig) -> dict[str, str]:
        """None."""
        return {}


@dataclass(frozen=True)
class Fp8:
    """e4m3 weights with a scale per row, or per block of 128 x 128; inputs are rounded when they come.

    Args:
        blocks: whether scales are of blocks.
    """

    blocks: bool = False

    @property
    def name(self) -> str:
        """``fp8``."""
        return "fp8"

    @property
    def grid(self) -> None:
        """None: e4m3 is no grid."""

    def encoding(self) -> Encoding:
        """Rounds to nearest."""
        return Fp8Blocks(_SCALE, _SCALE_DTYPE) if self.blocks else Fp8Rows(_SCALE, _SCALE_DTYPE)

    def pack(self, linear: QuantizedLinear) -> Mapping[str, torch.Tensor]:
        """Not possible."""
        raise NotImplementedError("FP8 weights are rounded to nearest")

    def shape_problem(self, name: str, shape: tuple[int, int]) -> Problem | None:
        """None: any width can be held."""
        return None

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """As llm-compressor writes it."""
        if self.blocks:
            weights = _arguments(num_bits=8, type_="float", strategy="block", block_structure=[BLOCK, BLOCK])
            inputs = _arguments(num_bits=8, type_="float", strategy="group", group_size=BLOCK, dynamic=True)
        else:
            weights = _arguments(num_bits=8, type_="float", strategy="channel")
            inputs = _arguments(num_bits=8, type_="float", strategy="token", dynamic=True)
        return _config(model, format_="float-quantized", weights=weights, inputs=inputs)

    def files(self, model: ModelConfig) -> dict[str, str]:
        """None."""
        return {}


def _arguments(
    *,
    num_bits: int,
    type_: str,
    strategy: str,
    dynamic: bool = False,
    group_size: int | None = None,
    block_structure: list[int] | None = None,
) -> dict[str, Any]:
    return {
        "num_bits": num_bits,
        "type": type_,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": block_structure,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def _config(
    model: ModelConfig, *, format_: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": format_}},
        "ignore": kept_modules(model),
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "version": _VERSION,
    }
