"""The types of GGUF tensors and the kinds of GGUF files.

A type packs consecutive values of a row into blocks. Numbers and sizes are those of ggml.h and ggml-common.h of
llama.cpp (https://github.com/ggml-org/llama.cpp); the file types are ``llama_ftype`` of llama.h.
"""

from dataclasses import dataclass
from enum import IntEnum


class GgmlType(IntEnum):
    """Type of a tensor, by its number in a file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def block_values(self) -> int:
        """Values of a block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return _BLOCKS[self][1]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; ``columns`` is a multiple of ``block_values``."""
        assert columns % self.block_values == 0, (self, columns)
        return columns // self.block_values * self.block_bytes


_BLOCKS = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.BF16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
}


@dataclass(frozen=True)
class Kind:
    """A kind of file, as llama-quantize names it.

    Args:
        name: such as ``Q4_K_M``.
        file_type: ``general.file_type``.
        base: type of the weights that its mixture does not single out.
    """

    name: str
    file_type: int
    base: GgmlType


KINDS = {
    kind.name: kind
    for kind in (
        Kind("F32", 0, GgmlType.F32),
        Kind("F16", 1, GgmlType.F16),
        Kind("BF16", 32, GgmlType.BF16),
        Kind("Q8_0", 7, GgmlType.Q8_0),
        Kind("Q6_K", 18, GgmlType.Q6_K),
        Kind("Q5_K_M", 17, GgmlType.Q5_K),
        Kind("Q4_K_M", 15, GgmlType.Q4_K),
        Kind("Q4_0", 2, GgmlType.Q4_0),
        Kind("Q3_K_M", 12, GgmlType.Q3_K),
        Kind("Q2_K", 10, GgmlType.Q2_K),
    )
}
