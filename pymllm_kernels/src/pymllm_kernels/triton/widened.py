"""Weight-only formats with many rows of x: the weights are widened, in blocks, for cuBLAS."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.norm import rms_norm, silu_mul

WIDENED = 1 << 25
"""Weights that are widened at a time: 64 MiB."""


def many_rows(
    x: Tensor,
    widen: Callable[[int, int], Tensor],
    total: int,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    gated: bool,
) -> Tensor:
    """Norm, widened weights times x, activation, residual.

    widen: from a first row and a number of rows to these rows of the weight, [rows, K] in x's dtype; total: all rows.
    """
    if norm is not None:
        x = rms_norm(unit_stride(x), *norm)
    step = max(WIDENED // x.shape[1], 1)
    blocks = []
    for first in range(0, total, step):
        rows = min(step, total - first)
        part = None if bias is None else bias[first : first + rows]
        blocks.append(F.linear(x, widen(first, rows), part))
    y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    y = silu_mul(y, dtype) if gated else y.to(dtype)
    return y if residual is None else y + residual
