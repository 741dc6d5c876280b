"""All formats of quantized weights in safetensors files, by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from checkpoints_convert.formats.awq import Awq
from checkpoints_convert.formats.compressed_tensors import W4A16, W8A8, Fp8
from checkpoints_convert.formats.fp8 import Fp8Block
from checkpoints_convert.formats.gptq import Gptq
from checkpoints_convert.formats.quantized_format import QuantizedFormat


@dataclass(frozen=True)
class FormatOptions:
    """What may be chosen of a format.

    Args:
        group: inputs that share a scale, of the formats that have groups.
        asymmetric: GPTQ with a zero for every group, which is written as "gptq_v2".
        act_order: GPTQ with groups of inputs in the order of their importance.
        fp8_blocks: ``fp8`` with scales of 128 x 128 blocks.
    """

    group: int = 128
    asymmetric: bool = False
    act_order: bool = False
    fp8_blocks: bool = False


def make_formats(options: FormatOptions) -> dict[str, QuantizedFormat]:
    """All formats with some options, by name."""
    formats: list[QuantizedFormat] = [
        *(Gptq(bits, options.group, symmetric=not options.asymmetric, act_order=options.act_order) for bits in (4, 8)),
        Awq(options.group),
        W4A16(options.group),
        W8A8(),
        Fp8(options.fp8_blocks),
        Fp8Block(),
    ]
    return {one.name: one for one in formats}


FORMATS: Mapping[str, QuantizedFormat] = make_formats(FormatOptions())
