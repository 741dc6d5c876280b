"""How rows of a weight become rows of a GGUF tensor."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from checkpoints_convert.encoding import SAME_NAME, Cast, EncodedTensor
from checkpoints_convert.formats.gguf.ggml_library import quantize
from checkpoints_convert.formats.gguf.types import GgmlType
from megatron_qwen.errors import ConversionError, Problem

_PLAIN = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}


@dataclass(frozen=True)
class GgmlEncoding:
    """Rows in blocks of a type of ggml.

    Every row is encoded for itself, so the threads and blocks do not decide the bytes.

    Args:
        type: of the tensor.
        importances: gives float32 [columns], how much each input of the weight matters (llama.cpp's importance matrix);
            None weighs as llama-quantize does without one.
        pool: threads that rows are divided over; None encodes in the calling one.
    """

    type: GgmlType
    importances: Callable[[], torch.Tensor] | None = None
    pool: Executor | None = None

    @property
    def block_rows(self) -> int:
        """One: blocks are consecutive values of a row."""
        return 1

    @property
    def working_dtype(self) -> torch.dtype:
        """The library reads float32."""
        return torch.float32

    def tensors(self, shape: tuple[int, ...]) -> dict[str, EncodedTensor]:
        """One, as bytes: [rows, bytes of a row]."""
        rows = torch.Size(shape[:-1]).numel()
        return {SAME_NAME: EncodedTensor((rows, self.type.row_bytes(shape[-1])), torch.uint8)}

    def encode(self, rows: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        """Encodes rows, [n, columns], or values of a vector, [n].

        Raises:
            ConversionError: a value is not finite, or too large for the type.
        """
        if not bool(rows.isfinite().all()):
            raise ConversionError(Problem(name, None, "holds values that are not finite; GGUF files cannot be used."))
        if self.type in _PLAIN:
            values = Cast(_PLAIN[self.type]).encode(rows, name=name)[SAME_NAME].contiguous()
            return {SAME_NAME: values.flatten().view(torch.uint8)}
        importances = None if self.importances is None else self.importances()
        packed = quantize(rows.float().contiguous(), self.type, importances=importances, pool=self.pool, name=name)
        return {SAME_NAME: packed}
