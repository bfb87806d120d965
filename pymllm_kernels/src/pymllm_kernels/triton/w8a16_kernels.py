"""Device code of W8A16: int8 weights, widened in registers, or into a buffer for cuBLAS.

Units are 16 columns, the 16 bytes that a thread loads. Where one group is a whole row (CHANNEL), its scale
multiplies the finished sum; otherwise a group is a multiple of 16 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.linear_kernels import finish_rows, load_rows, load_vector, load_x_columns
from pymllm_kernels.triton.norm import silu

UNIT = tl.constexpr(16)


@triton.jit
def unit_groups(
    scale, zero_point, rows, units, GROUPS: tl.constexpr, GROUP_UNITS: tl.constexpr, ASYMMETRIC: tl.constexpr
):
    """Scale and zero point, float32, of the units of each row."""
    group = tl.minimum(units // GROUP_UNITS, GROUPS - 1)
    at = rows[:, None].to(tl.int64) * GROUPS + group[None, :]
    s = tl.load(scale + at).to(tl.float32)
    z = tl.load(zero_point + at).to(tl.float32) if ASYMMETRIC else 0.0
    return s, z


@triton.jit
def add_units(
    acc,
    w,
    x,
    scale,
    zero_point,
    rows,
    first_unit,
    GROUPS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_K / 16] with one block's products added, scaled unless a group is a whole row."""
    product = w.to(tl.float32) * x[None, :]
    by_unit = tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // UNIT, UNIT)), axis=2)
    if GROUPS == 1:
        return acc + by_unit
    else:
        units = first_unit + tl.arange(0, BLOCK_K // UNIT)
        s, z = unit_groups(scale, zero_point, rows, units, GROUPS, GROUP_UNITS, ASYMMETRIC)
        x_sum = tl.sum(tl.reshape(x, (BLOCK_K // UNIT, UNIT)), axis=1)
        return acc + s * (by_unit - z * x_sum[None, :])


@triton.jit
def row_sum(
    acc,
    x_sum,
    scale,
    zero_point,
    rows,
    bias,
    factor,
    GROUPS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The results of the rows, from their units' sums. factor: the norm's."""
    y = tl.sum(acc, axis=1)
    if GROUPS == 1:
        if ASYMMETRIC:
            y -= tl.load(zero_point + rows).to(tl.float32) * x_sum
        y *= tl.load(scale + rows).to(tl.float32)
    y *= factor
    if BIAS:
        y += tl.load(bias + rows).to(tl.float32)
    return y


@triton.jit
def w8a16_matvec_kernel(
    x,
    weight,
    scale,
    zero_point,
    out,
    norm_weight,
    bias,
    residual,
    eps,
    N,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`linear_kernels.matvec_kernel` for int8 weights and x in the computation's dtype."""
    if PDL:
        gdc_launch_dependents()
    GROUP_UNITS: tl.constexpr = K // GROUPS // UNIT if GROUPS > 1 else 1
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    cols = tl.arange(0, BLOCK_K)
    w = load_rows(weight, rows, cols, K, BLOCK_K)
    w_up = w
    if GATED:
        w_up = load_rows(weight, rows + N, cols, K, BLOCK_K)
    if PDL:
        gdc_wait()
    xs = load_vector(x, cols, K, BLOCK_K)
    squares = xs * xs
    if NORM:
        xs *= load_vector(norm_weight, cols, K, BLOCK_K)
    plain = xs
    acc = tl.zeros((BLOCK_N, BLOCK_K // UNIT), dtype=tl.float32)
    acc_up = acc
    acc = add_units(acc, w, xs, scale, zero_point, rows, 0, GROUPS, GROUP_UNITS, BLOCK_N, BLOCK_K, ASYMMETRIC)
    if GATED:
        acc_up = add_units(
            acc_up,
            w_up,
            xs,
            scale,
            zero_point,
            rows + N,
            0,
            GROUPS,
            GROUP_UNITS,
            BLOCK_N,
            BLOCK_K,
            ASYMMETRIC,
        )
    if K > BLOCK_K:
        for start in tl.range(BLOCK_K, K, BLOCK_K, loop_unroll_factor=UNROLL):
            at, unit = start + cols, start // UNIT
            w = load_rows(weight, rows, at, K, BLOCK_K)
            if GATED:
                w_up = load_rows(weight, rows + N, at, K, BLOCK_K)
            xs = load_vector(x, at, K, BLOCK_K)
            if NORM:
                squares += xs * xs
                xs *= load_vector(norm_weight, at, K, BLOCK_K)
            plain += xs
            acc = add_units(
                acc, w, xs, scale, zero_point, rows, unit, GROUPS, GROUP_UNITS, BLOCK_N, BLOCK_K, ASYMMETRIC
            )
            if GATED:
                acc_up = add_units(
                    acc_up,
                    w_up,
                    xs,
                    scale,
                    zero_point,
                    rows + N,
                    unit,
                    GROUPS,
                    GROUP_UNITS,
                    BLOCK_N,
                    BLOCK_K,
                    ASYMMETRIC,
                )
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    x_sum = 0.0
    if ASYMMETRIC:
        x_sum = tl.sum(plain, axis=0)
    y = row_sum(acc, x_sum, scale, zero_point, rows, bias, factor, GROUPS, ASYMMETRIC, BIAS)
    if GATED:
        up = row_sum(acc_up, x_sum, scale, zero_point, rows + N, bias, factor, GROUPS, ASYMMETRIC, BIAS)
        y = silu(y) * up
    if RESIDUAL:
        y += tl.load(residual + rows).to(tl.float32)
    tl.store(out + wanted, y.to(out.dtype.element_ty), mask=wanted < N)


@triton.jit
def widened(
    w,
    scale,
    zero_point,
    rows,
    first_unit,
    dtype: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """(code - zero point) · scale, rounded once; a whole row's scale is left out."""
    wide = w.to(tl.float32)
    if GROUPS == 1:
        if ASYMMETRIC:
            wide -= tl.load(zero_point + rows).to(tl.float32)[:, None]
        return wide.to(dtype)
    else:
        units = first_unit + tl.arange(0, BLOCK_K // UNIT)
        s, z = unit_groups(scale, zero_point, rows, units, GROUPS, GROUP_UNITS, ASYMMETRIC)
        grouped = tl.reshape(wide, (BLOCK_N, BLOCK_K // UNIT, UNIT))
        if ASYMMETRIC:
            grouped -= z[:, :, None]
        return tl.reshape(grouped * s[:, :, None], (BLOCK_N, BLOCK_K)).to(dtype)


@triton.jit(do_not_specialize=["M"])
def w8a16_few_rows_kernel(
    x,
    weight,
    scale,
    zero_point,
    out,
    norm_weight,
    bias,
    residual,
    eps,
    M,
    N,
    x_stride,
    residual_stride,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`linear_kernels.few_rows_kernel` for int8 weights."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    GROUP_UNITS: tl.constexpr = K // GROUPS // UNIT if GROUPS > 1 else 1
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.arange(0, BLOCK_M)
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(wanted, N - 1)
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up = y
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        cols, unit = start + tl.arange(0, BLOCK_K), start // UNIT
        w = load_rows(weight, n, cols, K, BLOCK_K)
        a, squares = load_x_columns(x, norm_weight, rows, cols, M, x_stride, squares, K, BLOCK_K, NORM)
        w = widened(w, scale, zero_point, n, unit, dtype, GROUPS, GROUP_UNITS, BLOCK_N, BLOCK_K, ASYMMETRIC)
        y = tl.dot(w, a, y)
        if GATED:
            w_up = load_rows(weight, n + N, cols, K, BLOCK_K)
            w_up = widened(
                w_up, scale, zero_point, n + N, unit, dtype, GROUPS, GROUP_UNITS, BLOCK_N, BLOCK_K, ASYMMETRIC
            )
            up = tl.dot(w_up, a, up)
    if GROUPS == 1:
        y *= tl.load(scale + n).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scale + N + n).to(tl.float32)[:, None]
    finish_rows(
        y,
        up,
        squares,
        out,
        bias,
        residual,
        residual_stride,
        eps,
        rows,
        wanted,
        M,
        N,
        K,
        GATED,
        NORM,
        BIAS,
        RESIDUAL,
    )


@triton.jit(do_not_specialize=["first", "N"])
def w8a16_dequantize_kernel(
    weight,
    scale,
    zero_point,
    out,
    first,
    N,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """Rows first to N of the weight, dequantised, in out from its row 0 on."""
    GROUP_UNITS: tl.constexpr = K // GROUPS // UNIT if GROUPS > 1 else 1
    wanted = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    start = tl.program_id(1) * BLOCK_K
    cols = start + tl.arange(0, BLOCK_K)
    w = load_rows(weight, rows, cols, K, BLOCK_K)
    wide = widened(
        w,
        scale,
        zero_point,
        rows,
        start // UNIT,
        tl.float32,
        GROUPS,
        GROUP_UNITS,
        BLOCK_N,
        BLOCK_K,
        ASYMMETRIC,
    )
    if GROUPS == 1:
        wide *= tl.load(scale + rows).to(tl.float32)[:, None]
    at = out + (wanted - first)[:, None].to(tl.int64) * K + cols[None, :]
    mask = (wanted < N)[:, None] & (cols < K)[None, :]
    tl.store(at, wide.to(out.dtype.element_ty), mask=mask)
