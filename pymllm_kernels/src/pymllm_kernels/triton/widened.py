"""Weight-only formats with many rows of x: the weights are widened, in blocks, for cuBLAS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.norm import rms_norm, silu_mul

WIDENED = 1 << 25
"""Weights that are widened at a time: 64 MiB."""


def rows_at_a_time(columns: int, total: int) -> int:
    """So many rows of a weight as WIDENED allows, and as fill whole tiles of cuBLAS where there are many.

    1365 rows would leave tiles part empty, and results would begin at odd addresses.
    """
    rows = max(WIDENED // columns, 1)
    whole = next((size for size in (2048, 256) if rows >= size), 1)
    return min(rows // whole * whole, total)


def many_rows(
    x: Tensor,
    widen: Callable[[int, Tensor], None],
    total: int,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    gated: bool,
) -> Tensor:
    """Norm, widened weights times x, activation, residual.

    widen: fills its second argument, [rows, K] in x's dtype, with the weight's rows from the first argument on;
    total: all rows.
    """
    if norm is not None:
        x = rms_norm(unit_stride(x), *norm)
    tokens, columns = x.shape
    step = rows_at_a_time(columns, total)
    buffer = torch.empty((step, columns), dtype=x.dtype, device=x.device)
    # In the residual's own memory, which the contract allows, where nothing stands between product and sum.
    added = residual is not None and bias is None and not gated and dtype == residual.dtype == x.dtype
    y = residual if added else torch.empty((tokens, total), dtype=x.dtype, device=x.device)
    assert y is not None
    for first in range(0, total, step):
        wide = buffer[: min(step, total - first)]
        widen(first, wide)
        piece = y[:, first : first + len(wide)]
        if added:
            piece.addmm_(x, wide.t())
        elif bias is None:
            torch.mm(x, wide.t(), out=piece)
        else:
            torch.addmm(bias[first : first + len(wide)], x, wide.t(), out=piece)
    if added:
        return y
    y = silu_mul(y, dtype) if gated else y.to(dtype)
    return y if residual is None else y + residual
