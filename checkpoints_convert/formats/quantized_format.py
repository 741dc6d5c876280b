"""What a format of quantized weights in safetensors files has to say, and which weights are quantized."""

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from checkpoints_convert.encoding import Encoding
from checkpoints_convert.formats.quantized_linear import Grid, QuantizedLinear
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import Problem

# Projections of attention, feed-forward and experts. lm_head, embeddings, norms, biases, routers and shared-expert
# gates stay as they are, as in Qwen's own releases.
_QUANTIZED = re.compile(r"model\.layers\.[0-9]+\.(self_attn|mlp)\.(.+\.)?[a-z]+_proj\.weight")


def is_quantized(name: str) -> bool:
    """Whether formats quantize a tensor, by its Hugging Face name."""
    return _QUANTIZED.fullmatch(name) is not None


class QuantizedFormat(Protocol):
    """A format in which the linear layers of a model are stored."""

    @property
    def name(self) -> str:
        """As on the command line: ``gptq-int4``."""

    @property
    def grid(self) -> Grid | None:
        """What its values can be; None of FP8."""

    def encoding(self) -> Encoding:
        """Rounds a weight's rows to nearest and packs them."""

    def pack(self, linear: QuantizedLinear) -> Mapping[str, torch.Tensor]:
        """The tensors of a layer on the format's grid, by the last component of their names (``qweight``).

        Raises:
            NotImplementedError: of FP8, which nothing calibrates.
        """

    def shape_problem(self, name: str, shape: tuple[int, int]) -> Problem | None:
        """Why the format cannot hold a weight of [out, in], with the way out; None if it can."""

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """``quantization_config`` of config.json."""

    def files(self, model: ModelConfig) -> Mapping[str, str]:
        """Further files of the directory, by name (GPTQ's quantize_config.json)."""
