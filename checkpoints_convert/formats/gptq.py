"""GPTQ's format, in 4 and 8 bits: https://github.com/AutoGPTQ/AutoGPTQ, read by gptqmodel, transformers and vLLM.

A layer is ``qweight`` int32 [in * bits / 32, out], the first input in the lowest bits, ``qzeros`` int32
[groups, out * bits / 32] likewise along out, ``scales`` fp16 [groups, out], and ``g_idx`` int32 [in], the group of
every input. A weight is (q - z) * s. The first version of the format stores z - 1, which is 0x77777777 for symmetric
int4; "gptq_v2" stores z. gptqmodel refuses asymmetric weights in the first version, so those are in the second.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints_convert.encoding import EncodedTensor
from checkpoints_convert.formats.grid_encoding import GridEncoding
from checkpoints_convert.formats.kept_modules import grid_shape_problem, kept_modules
from checkpoints_convert.formats.parts import Parts
from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from checkpoints_convert.formats.words import codes_of_a_word, pack_words
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import Problem

_CONFIG_FILE = "quantize_config.json"


@dataclass(frozen=True)
class Gptq:
    """The format with its options.

    Args:
        bits: 4 or 8.
        group: inputs that share a scale.
        symmetric: whether zero is the middle code.
        act_order: whether groups are of inputs in the order of their importance, which ``g_idx`` has then.
        damping: what the calibration added to the Hessian's diagonal, in parts of its mean; for the record.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    act_order: bool = False
    damping: float = 0.01

    @property
    def name(self) -> str:
        """``gptq-int4`` or ``gptq-int8``."""
        return f"gptq-int{self.bits}"

    @property
    def grid(self) -> Grid:
        """Groups of inputs; scales in fp16."""
        return Grid(self.bits, self.group, self.symmetric, torch.float16)

    def encoding(self) -> GridEncoding:
        """Rounds to nearest."""
        return GridEncoding(self, None, side_rows=codes_of_a_word(self.bits))

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        """The four tensors of a layer of [out, in]."""
        rows, columns = shape
        word, groups = codes_of_a_word(self.bits), self.grid.groups(columns)
        zeros = (groups, rows // word)
        # Symmetric zeros are all alike, so that no row has to be read for them.
        alike = (lambda: torch.full(zeros, self._symmetric_zeros(), dtype=torch.int32)) if self.symmetric else None
        return {
            "qweight": EncodedTensor((columns // word, rows), torch.int32),
            "qzeros": EncodedTensor(zeros, torch.int32, alike),
            "scales": EncodedTensor((groups, rows), torch.float16),
            "g_idx": EncodedTensor((columns,), torch.int32, lambda: self._consecutive(columns)),
        }

    def packed(self, codes: Callable[[], torch.Tensor], scales: torch.Tensor, zeros: torch.Tensor) -> Parts:
        """Those of them that are made of rows: codes [out, in], scales and zeros [out, groups]."""
        first_version = 1 if self.symmetric else 0
        return Parts(
            {
                "qweight": lambda: pack_words(codes(), self.bits).T,
                # Of a zero of 0 the first version would store 0 - 1, which wraps; symmetric zeros are never 0.
                "qzeros": lambda: pack_words((zeros - first_version).T, self.bits),
                "scales": lambda: scales.T.half(),
            }
        )

    def pack(self, linear: QuantizedLinear) -> Mapping[str, torch.Tensor]:
        """All four."""
        columns = linear.codes.shape[1]
        made = self.packed(lambda: linear.codes, linear.scales, linear.zeros)
        order = self._consecutive(columns) if linear.group_of is None else linear.group_of.to(torch.int32)
        return made.also({"g_idx": lambda: order})

    def shape_problem(self, name: str, shape: tuple[int, int]) -> Problem | None:
        """Inputs that are no whole groups, or outputs that fill no word of zeros."""
        return grid_shape_problem(name, shape, self.grid, words_along_rows=True)

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """As Qwen's releases have it. ``dynamic`` is gptqmodel's, read by vLLM as well: -: excludes modules."""
        excluded: dict[str, dict[str, Any]] = {
            f"-:^{name.replace('.', '[.]')}$": {} for name in kept_modules(model) if name != "lm_head"
        }
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.act_order,
            "sym": self.symmetric,
            "true_sequential": True,
            "static_groups": False,
            "damp_percent": self.damping,
            "checkpoint_format": "gptq" if self.symmetric else "gptq_v2",
            "lm_head": False,
            "pack_dtype": "int32",
            "model_file_base_name": "model",
            "model_name_or_path": None,
        } | ({"dynamic": excluded} if excluded else {})

    def files(self, model: ModelConfig) -> dict[str, str]:
        """quantize_config.json, the same once more: gptqmodel and older readers look there."""
        return {_CONFIG_FILE: json.dumps(self.config(model), indent=2) + "\n"}

    def _symmetric_zeros(self) -> int:
        """A word of middle codes, each stored less one."""
        codes = torch.full((codes_of_a_word(self.bits),), (1 << (self.bits - 1)) - 1, dtype=torch.uint8)
        return int(pack_words(codes, self.bits))

    def _consecutive(self, columns: int) -> torch.Tensor:
        return (torch.arange(columns) // self.group).to(torch.int32)
