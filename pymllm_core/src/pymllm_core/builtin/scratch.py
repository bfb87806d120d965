"""One buffer for dequantised weights on the CPU, used again and again.

A fresh temporary of 33 MB costs up to 40 ms in page faults, more than the product it is made for.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Weights that are dequantised at a time: 8 MiB in bfloat16."""


class _Scratch:
    buffer = torch.empty(0)


def take(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A [rows, columns] tensor whose contents are garbage, valid until the next call: nodes run one by one."""
    count = rows * columns
    if _Scratch.buffer.dtype != dtype or _Scratch.buffer.numel() < count:
        # A tensor that is made in inference mode cannot be written to outside of it.
        with torch.inference_mode(mode=False):
            _Scratch.buffer = torch.empty(max(count, BLOCK), dtype=dtype)
    return _Scratch.buffer[:count].view(rows, columns)
