"""Device code of the dense linear for few rows: weights are streamed once, all else is fused around them.

The norm's factor 1 / rms multiplies the finished sums, so that no weight waits for it: with n the norm's
weight, rms(x)⁻¹ Σ (x n) W is Σ (x rms(x)⁻¹ n) W.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.norm import silu

RUN = tl.constexpr(8)
"""Neighbouring columns that a thread holds of a row: 16 bytes."""


@triton.jit
def load_rows(weight, rows, cols, K: tl.constexpr, BLOCK_K: tl.constexpr):
    at = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
    if K % BLOCK_K == 0:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=(cols < K)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def load_vector(at, cols, K: tl.constexpr, BLOCK_K: tl.constexpr):
    if K % BLOCK_K == 0:
        return tl.load(at + cols).to(tl.float32)
    else:
        return tl.load(at + cols, mask=cols < K, other=0.0).to(tl.float32)


@triton.jit
def run_sums(w, x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    product = w.to(tl.float32) * x[None, :]
    # Within a thread: sums over threads and warps are made once, after the last block.
    return tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // RUN, RUN)), axis=2)


@triton.jit
def matvec_kernel(
    x,
    weight,
    out,
    norm_weight,
    bias,
    residual,
    eps,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [N] = act(norm(x) @ weight.T + bias) + residual for one row x [K].

    weight: [N, K], or [2 N, K] where GATED. A program makes BLOCK_N results. STAGES, UNROLL: of the loop
    over K; one stage means plain loads.
    """
    if PDL:
        gdc_launch_dependents()
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    # The first block of weights is on its way before x is there.
    cols = tl.arange(0, BLOCK_K)
    w = load_rows(weight, rows, cols, K, BLOCK_K)
    if GATED:
        w_up = load_rows(weight, rows + N, cols, K, BLOCK_K)
    if PDL:
        gdc_wait()
    xs = load_vector(x, cols, K, BLOCK_K)
    if NORM:
        squares = xs * xs
        xs *= load_vector(norm_weight, cols, K, BLOCK_K)
    acc = run_sums(w, xs, BLOCK_N, BLOCK_K)
    if GATED:
        acc_up = run_sums(w_up, xs, BLOCK_N, BLOCK_K)
    if K > BLOCK_K:
        for start in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES, loop_unroll_factor=UNROLL):
            at = start + cols
            w = load_rows(weight, rows, at, K, BLOCK_K)
            if GATED:
                w_up = load_rows(weight, rows + N, at, K, BLOCK_K)
            xs = load_vector(x, at, K, BLOCK_K)
            if NORM:
                squares += xs * xs
                xs *= load_vector(norm_weight, at, K, BLOCK_K)
            acc += run_sums(w, xs, BLOCK_N, BLOCK_K)
            if GATED:
                acc_up += run_sums(w_up, xs, BLOCK_N, BLOCK_K)
    y = tl.sum(acc, axis=1)
    if GATED:
        up = tl.sum(acc_up, axis=1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        y *= scale
        if GATED:
            up *= scale
    if BIAS:
        y += tl.load(bias + rows).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + rows).to(tl.float32)
    if GATED:
        y = silu(y) * up
    if RESIDUAL:
        y += tl.load(residual + rows).to(tl.float32)
    tl.store(out + wanted, y.to(out.dtype.element_ty), mask=wanted < N)


PRESCALE = tl.constexpr(2.0**-6)
"""x times the norm's weight, before the division by its rms, must fit float16; a power of two rounds nothing."""


@triton.jit
def load_x_columns(
    x,
    norm_weight,
    rows,
    cols,
    M,
    x_stride,
    squares,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """Rows of x as the right operand [BLOCK_K, BLOCK_M], and the running sums of their squares."""
    at = x + tl.minimum(rows, M - 1)[None, :] * x_stride + cols[:, None]
    a = tl.load(at) if K % BLOCK_K == 0 else tl.load(at, mask=(cols < K)[:, None], other=0.0)
    if NORM:
        wide = a.to(tl.float32)
        squares += tl.sum(wide * wide, axis=0)
        gain = load_vector(norm_weight, cols, K, BLOCK_K)
        a = (wide * (gain * PRESCALE)[:, None]).to(a.dtype)
    return a, squares


@triton.jit
def finish_rows(
    y,
    up,
    squares,
    out,
    bias,
    residual,
    residual_stride,
    eps,
    rows,
    cols,
    M,
    N,
    K: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The epilogue of a product [BLOCK_N, BLOCK_M]: norm's factor, bias, activation, residual, store."""
    safe = tl.minimum(cols, N - 1)
    if NORM:
        scale = (tl.rsqrt(squares / K + eps) / PRESCALE)[None, :]
        y *= scale
        if GATED:
            up *= scale
    if BIAS:
        y += tl.load(bias + safe).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias + N + safe).to(tl.float32)[:, None]
    if GATED:
        y = silu(y) * up
    mask = (rows < M)[None, :] & (cols < N)[:, None]
    if RESIDUAL:
        at = residual + rows[None, :] * residual_stride + cols[:, None]
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows[None, :].to(tl.int64) * N + cols[:, None], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x,
    weight,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`matvec_kernel` for M rows, at most BLOCK_M, on the tensor cores. x: [M, K]; out: [M, N].

    The weight is the left operand, whose rows the warps share: 2 to 4 times as fast on an H200 as the
    product with x on the left, where every warp reads the whole weight block.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.arange(0, BLOCK_M)
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows = tl.minimum(wanted, N - 1)
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up = y
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_K)
        w = load_rows(weight, weight_rows, cols, K, BLOCK_K)
        a, squares = load_x_columns(x, norm_weight, rows, cols, M, x_stride, squares, K, BLOCK_K, NORM)
        y = tl.dot(w, a, y)
        if GATED:
            w_up = load_rows(weight, weight_rows + N, cols, K, BLOCK_K)
            up = tl.dot(w_up, a, up)
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
