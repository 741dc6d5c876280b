"""llama.cpp's own quantisation, called in the library of the xllamacpp package.

The package is a binding of llama.cpp; its shared library exports ``ggml_quantize_chunk`` of ggml.h, with which
llama-quantize makes every block. So the bytes are those of llama-quantize by construction.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.formats.gguf.types import GgmlType
from megatron_qwen.errors import ConversionError, Problem

_PACKAGE, _LIBRARY = "xllamacpp", "xllamacpp*.so"
# Values that a thread quantizes at once: 7 to 440 ms of work by the measured rates of the types.
_CHUNK = 1 << 18


@cache
def _library() -> Any:
    """The shared library.

    Raises:
        ConversionError: xllamacpp is not installed, or has no such function.
    """
    found = importlib.util.find_spec(_PACKAGE)
    files = sorted(
        Path(place)
        for where in (found.submodule_search_locations or () if found else ())
        for place in Path(where).glob(_LIBRARY)
    )
    if not files:
        fix = "is not installed; GGUF's quantized types are made by its library: pip install xllamacpp."
        raise ConversionError(Problem(_PACKAGE, None, fix))
    try:
        library = ctypes.CDLL(str(files[0]))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_validate_row_data.restype = ctypes.c_bool
        library.ggml_quantize_init.restype = None
    except (OSError, AttributeError) as error:
        fix = f"has no ggml_quantize_chunk ({error}); install the version of constraints.txt."
        raise ConversionError(Problem(_PACKAGE, str(files[0].name), fix)) from None
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # source, float32
        ctypes.c_void_p,  # target
        ctypes.c_int64,  # first value
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # values of a row
        ctypes.c_void_p,  # importances, float32 [columns], or null
    ]
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    return library


def require_library() -> None:
    """Raises ConversionError where the library cannot be used."""
    _library()


def quantize(
    rows: torch.Tensor, kind: GgmlType, *, importances: torch.Tensor | None, pool: Executor | None, name: str
) -> torch.Tensor:
    """Rows in blocks of a type.

    Args:
        rows: float32 [n, columns], contiguous; columns a multiple of the type's block.
        kind: the type.
        importances: float32 [columns], the mean square of each input; None weighs by the values themselves.
        pool: threads to divide the rows over; ctypes releases the interpreter's lock.
        name: of the tensor, for messages.

    Returns:
        uint8 [n, bytes of a row].

    Raises:
        ConversionError: a value is not finite, or too large for the scales of the type.
    """
    library = _library()
    library.ggml_quantize_init(kind)
    count, columns = rows.shape
    assert rows.dtype == torch.float32
    assert rows.is_contiguous()
    target = torch.empty((count, kind.row_bytes(columns)), dtype=torch.uint8)
    weights = None if importances is None else importances.data_ptr()

    def chunk(span: tuple[int, int]) -> bool:
        first, stop = span
        # The first value decides the place in both arrays.
        size = library.ggml_quantize_chunk(
            kind, rows.data_ptr(), target.data_ptr(), first * columns, stop - first, columns, weights
        )
        made = target[first:stop]
        assert size == made.numel(), (name, kind, size, made.numel())
        return bool(library.ggml_validate_row_data(kind, made.data_ptr(), size))

    spans = list(_spans(count, max(1, _CHUNK // columns)))
    fits = all([chunk(span) for span in spans] if pool is None else pool.map(chunk, spans))
    if not fits:
        fix = f"holds values that are not finite, or too large for {kind.name}; choose BF16 or F32."
        raise ConversionError(Problem(name, kind.name, fix))
    return target


def _spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, step):
        yield first, min(count, first + step)
