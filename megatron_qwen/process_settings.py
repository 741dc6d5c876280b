"""Settings of a whole process: warnings, log levels, allocators. None of them changes a library or a number.

They are made before anything else runs; what replaces code of megatron-core or torch is in core_patches/.
"""

import contextlib
import ctypes
import logging
import os
import warnings

# Parameters of mallopt, by their numbers in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Blocks of up to 1 GiB, and no bound on free memory: mallopt takes an int.
_LARGEST_BLOCK, _MOST_FREE = 1 << 30, (1 << 31) - 1


def apply(*, gpu: bool) -> None:
    """Makes the settings of a process that builds or runs a model; a second call changes nothing.

    Args:
        gpu: whether it computes on a GPU.
    """
    hide_notices()
    if gpu:
        # Segments that grow leave less memory unusable between tensors of many sizes. Read at the first allocation.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    else:
        keep_freed_memory()


def hide_notices() -> None:
    """Hides what libraries print on every rank and nobody can act on."""
    # megatron-core says at import what it lacks; which kernels run is in our own log.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=".*pynvml.*")
    # torch.distributed.checkpoint objects to how megatron-core calls it.
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")
    for name in ("torch.utils.cpp_extension", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_freed_memory(*, largest_block: int = _LARGEST_BLOCK, most_free: int = _MOST_FREE) -> None:
    """Has glibc hand out freed memory again instead of returning it: that costs a page fault per 4 KiB at every reuse.

    Args:
        largest_block: bytes of the largest block that is kept; larger ones are mapped and unmapped one by one.
        most_free: free bytes at the end of the heap from which on they are returned.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, largest_block)
        libc.mallopt(_M_TRIM_THRESHOLD, most_free)
