"""Large buffers on the CPU: zeroed on first touch, on huge pages where the kernel has them.

Reading weights from 2 MiB pages is up to 1.7 times as fast as from 4 KiB pages (fewer TLB misses).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


@functools.cache
def _malloc_trim() -> object:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library than glibc
        return None


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    glibc learns to keep blocks of up to 32 MB for later, and small objects between them keep it from using them
    again: temporaries of thousands of weights of a few megabytes add up to a second copy of the model.
    """
    trim = _malloc_trim()
    if callable(trim):
        trim(0)


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like `torch.zeros` on the CPU, but memory is taken only as it is written to."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype)
    # Private: Python's default is shared, which gets no huge pages in `madvise` mode. Only whole pages can be huge.
    length = -(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # no such advice here: small pages do
        region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    # The tensor keeps the mapping alive; huge pages need the data to start at a multiple of their size.
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)
