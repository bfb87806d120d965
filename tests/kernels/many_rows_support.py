"""What the tests of the linear node of many rows share: one product against float64."""

from __future__ import annotations

import torch
from few_rows_support import BF16, ended
from torch import Tensor
from triton_support import TINY, randn, rel_error

from pymllm_kernels.cuda.few_rows_library import Operand
from pymllm_kernels.cuda.many_rows_library import ManyRows, Plan


def check(
    kernels: ManyRows,
    rows: int,
    n: int,
    k: int,
    plan: Plan,
    *,
    seed: int = 0,
    gated: bool = False,
    bias: bool = False,
    residual: bool = False,
    out_dtype: torch.dtype = BF16,
    device: torch.device | None = None,
) -> Tensor:
    """One product with this plan against float64. n: results. device: the CPU by default. Returns the result."""
    device = device or torch.device("cpu")
    total = 2 * n if gated else n
    weight = randn(seed, total, k, scale=k**-0.5).to(device)
    add_bias = randn(seed + 3, total).to(device) if bias else None
    # Rows of x and of the residual lie apart.
    x = randn(seed + 4, rows, k + 16).to(device)[:, 8 : k + 8]
    add = randn(seed + 5, rows, n + 6).to(device)[:, 2 : n + 2] if residual else None
    own = Operand(weight, n, gated, bias=None if add_bias is None else add_bias.float())
    # Poison what the caching allocator will hand out for the result.
    torch.full((rows, n), float("nan"), dtype=out_dtype, device=device)
    out = kernels(x, own, plan, residual=add, dtype=out_dtype)
    y = ended(x.double() @ weight.double().T, add_bias, add, gated=gated)
    assert out.shape == (rows, n)
    assert out.dtype == out_dtype
    # One rounding of the result; float32 sums lose more the longer they are.
    assert rel_error(out, y) < 1e-5 + 3e-9 * k + TINY[BF16] * (out_dtype == BF16)
    return out
