"""All formats of quantized weights in safetensors files, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
        damping: of GPTQ, for the record.
    """

    group: int = 128
    asymmetric: bool = False
    act_order: bool = False
    fp8_blocks: bool = False
    damping: float = 0.01


def make_formats(options: FormatOptions) -> dict[str, QuantizedFormat]:
    """All formats with some options, by name."""
    gptq = Gptq(
        group=options.group, symmetric=not options.asymmetric, act_order=options.act_order, damping=options.damping
    )
    formats: list[QuantizedFormat] = [
        *(replace(gptq, bits=bits) for bits in (4, 8)),
        Awq(options.group),
        W4A16(options.group),
        W8A8(),
        Fp8(options.fp8_blocks),
        Fp8Block(),
    ]
    return {one.name: one for one in formats}


FORMATS: Mapping[str, QuantizedFormat] = make_formats(FormatOptions())
