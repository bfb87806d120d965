"""Long-lived buffers on 2 MB pages, from which weights stream at full memory bandwidth."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE = 2 << 20


def empty_huge(count: int, dtype: torch.dtype) -> Tensor:
    """A 1-D tensor of ``count`` zeros in anonymous memory, 2 MB aligned, on huge pages.

    Where the kernel refuses huge pages the buffer has small ones. The tensor owns the memory.

    Raises:
        ValueError: ``count`` is not positive.
        OSError: not enough address space.
    """
    if count <= 0:
        raise ValueError(f"count must be positive, got {count}")
    size = count * dtype.itemsize
    # Only whole 2 MB pages can be huge: round up, and add one page to align the start.
    # Private memory: Python's default is shared, which gets no huge pages in `madvise` mode.
    region = mmap.mmap(
        -1,
        -(-size // _HUGE) * _HUGE + _HUGE,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
    )
    with contextlib.suppress(AttributeError, OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(region, dtype=torch.uint8)  # holds a reference to the mmap
    skip = -raw.data_ptr() % _HUGE
    return raw[skip : skip + size].view(dtype)
