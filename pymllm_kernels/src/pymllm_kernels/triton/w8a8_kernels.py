"""Device code of W8A8: exact integer products on the tensor cores, or one row against all weights."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.linear_kernels import load_rows, load_vector
from pymllm_kernels.triton.norm import silu
from pymllm_kernels.triton.quantize import codes_of, row_quantisation

RUN = tl.constexpr(16)
"""Neighbouring columns that a thread holds of a row: 16 bytes."""


@triton.jit
def int_run_sums(w, codes, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    product = w.to(tl.int32) * codes[None, :]
    return tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // RUN, RUN)), axis=2)


@triton.jit
def scaled(product, scale, zero, weight_scale, weight_sum, ASYMMETRIC: tl.constexpr):
    """scale · weight_scale · (product - zero · weight_sum), the arguments broadcast against product."""
    if ASYMMETRIC:
        # The correction of a row far from zero does not fit int32.
        exact = product.to(tl.int64) - zero.to(tl.int64) * weight_sum.to(tl.int64)
        return exact.to(tl.float32) * scale * weight_scale
    else:
        return product.to(tl.float32) * scale * weight_scale


@triton.jit
def w8a8_matvec_kernel(
    x,
    weight,
    weight_scale,
    weight_sum,
    out,
    norm_weight,
    bias,
    residual,
    eps,
    input_scale,
    input_zero,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    STATIC: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`linear_kernels.matvec_kernel` for int8: every program quantises the row x [K] for itself."""
    if PDL:
        gdc_launch_dependents()
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    cols = tl.arange(0, BLOCK_K)
    # On its way while the row is quantised.
    w = load_rows(weight, rows, cols, K, BLOCK_K)
    if GATED:
        w_up = load_rows(weight, rows + N, cols, K, BLOCK_K)
    if PDL:
        gdc_wait()
    squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
    absmax = tl.zeros((BLOCK_K,), dtype=tl.float32)
    low = tl.full((BLOCK_K,), float("inf"), dtype=tl.float32)
    high = tl.full((BLOCK_K,), float("-inf"), dtype=tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        at = start + cols
        values = load_vector(x, at, K, BLOCK_K)
        if NORM:
            squares += values * values
            values *= load_vector(norm_weight, at, K, BLOCK_K)
        absmax = tl.maximum(absmax, tl.abs(values))
        if ASYMMETRIC:
            inside = at < K
            low = tl.minimum(low, tl.where(inside, values, float("inf")))
            high = tl.maximum(high, tl.where(inside, values, float("-inf")))
    rms_inverse = 1.0
    if NORM:
        rms_inverse = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    divisor, scale, zero = row_quantisation(
        tl.max(absmax, axis=0),
        tl.min(low, axis=0),
        tl.max(high, axis=0),
        rms_inverse,
        input_scale,
        input_zero,
        STATIC,
        ASYMMETRIC,
    )
    acc = tl.zeros((BLOCK_N, BLOCK_K // RUN), dtype=tl.int32)
    acc_up = acc
    for start in tl.static_range(0, K, BLOCK_K):
        at = start + cols
        if start > 0:
            w = load_rows(weight, rows, at, K, BLOCK_K)
            if GATED:
                w_up = load_rows(weight, rows + N, at, K, BLOCK_K)
        values = load_vector(x, at, K, BLOCK_K)
        if NORM:
            values *= load_vector(norm_weight, at, K, BLOCK_K)
        codes = codes_of(values, divisor, zero, STATIC, ASYMMETRIC).to(tl.int32)
        acc += int_run_sums(w, codes, BLOCK_N, BLOCK_K)
        if GATED:
            acc_up += int_run_sums(w_up, codes, BLOCK_N, BLOCK_K)
    sums, up_sums = rows, rows
    if ASYMMETRIC:
        sums = tl.load(weight_sum + rows)
        if GATED:
            up_sums = tl.load(weight_sum + N + rows)
    y = scaled(tl.sum(acc, axis=1), scale, zero, tl.load(weight_scale + rows), sums, ASYMMETRIC)
    if BIAS:
        y += tl.load(bias + rows).to(tl.float32)
    if GATED:
        up_scale = tl.load(weight_scale + N + rows)
        up = scaled(tl.sum(acc_up, axis=1), scale, zero, up_scale, up_sums, ASYMMETRIC)
        if BIAS:
            up += tl.load(bias + N + rows).to(tl.float32)
        y = silu(y) * up
    if RESIDUAL:
        y += tl.load(residual + rows).to(tl.float32)
    tl.store(out + wanted, y.to(out.dtype.element_ty), mask=wanted < N)


@triton.jit(do_not_specialize=["M"])
def w8a8_few_rows_kernel(
    codes,
    weight,
    scales,
    zeros,
    weight_scale,
    weight_sum,
    out,
    bias,
    residual,
    M,
    N,
    residual_stride,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`w8a8_matmul_kernel` for at most BLOCK_M rows, with the weight as the left operand, as `few_rows_kernel`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.arange(0, BLOCK_M)
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, n = tl.minimum(rows, M - 1), tl.minimum(wanted, N - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    acc_up = acc
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_K)
        at = codes + m[None, :] * K + cols[:, None]
        w = load_rows(weight, n, cols, K, BLOCK_K)
        a = tl.load(at) if K % BLOCK_K == 0 else tl.load(at, mask=(cols < K)[:, None], other=0)
        acc = tl.dot(w, a, acc, out_dtype=tl.int32)
        if GATED:
            w_up = load_rows(weight, n + N, cols, K, BLOCK_K)
            acc_up = tl.dot(w_up, a, acc_up, out_dtype=tl.int32)
    scale = tl.load(scales + m)[None, :]
    zero, sums, up_sums = 0.0, n, n
    if ASYMMETRIC:
        zero = tl.load(zeros + m)[None, :]
        sums = tl.load(weight_sum + n)[:, None]
        if GATED:
            up_sums = tl.load(weight_sum + N + n)[:, None]
    y = scaled(acc, scale, zero, tl.load(weight_scale + n)[:, None], sums, ASYMMETRIC)
    if BIAS:
        y += tl.load(bias + n).to(tl.float32)[:, None]
    if GATED:
        up = scaled(acc_up, scale, zero, tl.load(weight_scale + N + n)[:, None], up_sums, ASYMMETRIC)
        if BIAS:
            up += tl.load(bias + N + n).to(tl.float32)[:, None]
        y = silu(y) * up
    if RESIDUAL:
        y += tl.load(residual + m[None, :] * residual_stride + n[:, None]).to(tl.float32)
    mask = (rows < M)[None, :] & (wanted < N)[:, None]
    tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def w8a8_matmul_kernel(
    codes,
    weight,
    scales,
    zeros,
    weight_scale,
    weight_sum,
    out,
    bias,
    residual,
    M,
    N,
    residual_stride,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """codes [M, K] int8 times weight [N, K] (or [2 N, K]), then the epilogue. scales, zeros: [M] float32.

    Programs go down GROUP_M blocks of rows before the next block of columns, so that L2 serves both operands.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP_M * blocks_n) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    block_m = first + program % (GROUP_M * blocks_n) % height
    block_n = program % (GROUP_M * blocks_n) // height
    wanted_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m, n = tl.minimum(wanted_m, M - 1), tl.minimum(wanted_n, N - 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    acc_up = acc
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_K)
        at = codes + m[:, None].to(tl.int64) * K + cols[None, :]
        a = tl.load(at) if K % BLOCK_K == 0 else tl.load(at, mask=(cols < K)[None, :], other=0)
        acc = tl.dot(a, tl.trans(load_rows(weight, n, cols, K, BLOCK_K)), acc, out_dtype=tl.int32)
        if GATED:
            w_up = load_rows(weight, n + N, cols, K, BLOCK_K)
            acc_up = tl.dot(a, tl.trans(w_up), acc_up, out_dtype=tl.int32)
    scale = tl.load(scales + m)[:, None]
    zero, sums, up_sums = 0.0, n, n
    if ASYMMETRIC:
        zero = tl.load(zeros + m)[:, None]
        sums = tl.load(weight_sum + n)[None, :]
        if GATED:
            up_sums = tl.load(weight_sum + N + n)[None, :]
    y = scaled(acc, scale, zero, tl.load(weight_scale + n)[None, :], sums, ASYMMETRIC)
    if BIAS:
        y += tl.load(bias + n).to(tl.float32)[None, :]
    if GATED:
        up = scaled(acc_up, scale, zero, tl.load(weight_scale + N + n)[None, :], up_sums, ASYMMETRIC)
        if BIAS:
            up += tl.load(bias + N + n).to(tl.float32)[None, :]
        y = silu(y) * up
    mask = (wanted_m < M)[:, None] & (wanted_n < N)[None, :]
    if RESIDUAL:
        at = residual + m[:, None].to(tl.int64) * residual_stride + n[None, :]
        y += tl.load(at).to(tl.float32)
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], y.to(out.dtype.element_ty), mask=mask)
