"""Device code of W4A16: weights of 4 bits are widened in registers, or into a buffer for cuBLAS.

Weights are words of 8 codes. Nibble i of word 4 u + j is the code, 0 to 15, of column 32 u + 4 i + j: so the
four words (16 bytes) that a thread loads hold 32 neighbouring columns, which share a group, and nibble i of
them needs four neighbouring values of x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.linear_kernels import PRESCALE, finish_rows
from pymllm_kernels.triton.norm import silu


@triton.jit
def load_words(weight, rows, words, WORDS: tl.constexpr, BLOCK_W: tl.constexpr):
    at = weight + rows[:, None].to(tl.int64) * WORDS + words[None, :]
    if WORDS % BLOCK_W == 0:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=(words < WORDS)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def raised(words, nibble: tl.constexpr):
    """1 + code / 16 as float32: the code's bits become the highest of the fraction, with no conversion."""
    bits = words << (19 - 4 * nibble) if nibble <= 4 else words >> (4 * nibble - 19)
    return ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def load_nibble_columns(at, words, nibble: tl.constexpr, WORDS: tl.constexpr, BLOCK_W: tl.constexpr):
    """The float32 values at the columns that this nibble of the words stands for."""
    cols = words // 4 * 32 + 4 * nibble + words % 4
    if WORDS % BLOCK_W == 0:
        return tl.load(at + cols).to(tl.float32)
    else:
        return tl.load(at + cols, mask=words < WORDS, other=0.0).to(tl.float32)


@triton.jit
def load_groups(
    scale,
    zero_point,
    rows,
    units,
    UNITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """Scale and zero point, float32, of units of 32 columns; UNITS of them in a row."""
    unit = tl.minimum(units, UNITS - 1)
    at = rows[:, None].to(tl.int64) * (UNITS // GROUP_UNITS) + (unit // GROUP_UNITS)[None, :]
    s = tl.load(scale + at).to(tl.float32)
    z = tl.load(zero_point + at).to(tl.float32) if ASYMMETRIC else 0.0
    return s, z


@triton.jit
def scaled_units(total, x_sum, s, z, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """scale · (sum of (code - 8 - zero) · x) / 16 of each unit, from the sums of raised(code) · x and of x."""
    by_unit = tl.sum(tl.reshape(total, (BLOCK_N, BLOCK_W // 4, 4)), axis=2)
    return s * (by_unit - x_sum * (1.5 + z * 0.0625))


@triton.jit
def add_block(
    acc,
    acc_up,
    squares,
    w,
    w_up,
    x,
    norm_weight,
    scale,
    zero_point,
    rows,
    N,
    words,
    units,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """The sums with the words w (and w_up) added. acc: [BLOCK_N, BLOCK_W / 4]; squares: [BLOCK_W]."""
    total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    total_up = total
    plain = tl.zeros((BLOCK_W,), dtype=tl.float32)
    for nibble in tl.static_range(8):
        part = load_nibble_columns(x, words, nibble, WORDS, BLOCK_W)
        if NORM:
            squares += part * part
            part *= load_nibble_columns(norm_weight, words, nibble, WORDS, BLOCK_W)
        plain += part
        total += raised(w, nibble) * part[None, :]
        if GATED:
            total_up += raised(w_up, nibble) * part[None, :]
    x_sum = tl.sum(tl.reshape(plain, (BLOCK_W // 4, 4)), axis=1)[None, :]
    s, z = load_groups(scale, zero_point, rows, units, UNITS, GROUP_UNITS, ASYMMETRIC)
    acc += scaled_units(total, x_sum, s, z, BLOCK_N, BLOCK_W)
    if GATED:
        s, z = load_groups(scale, zero_point, rows + N, units, UNITS, GROUP_UNITS, ASYMMETRIC)
        acc_up += scaled_units(total_up, x_sum, s, z, BLOCK_N, BLOCK_W)
    return acc, acc_up, squares


@triton.jit
def w4a16_matvec_kernel(
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
    GROUP_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    UNROLL: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`linear_kernels.matvec_kernel` for weights of 4 bits: BLOCK_W words, 8 BLOCK_W columns a step."""
    if PDL:
        gdc_launch_dependents()
    WORDS: tl.constexpr = K // 8
    UNITS: tl.constexpr = K // 32
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    first = tl.arange(0, BLOCK_W)
    first_units = tl.arange(0, BLOCK_W // 4)
    w = load_words(weight, rows, first, WORDS, BLOCK_W)
    w_up = w
    if GATED:
        w_up = load_words(weight, rows + N, first, WORDS, BLOCK_W)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_W // 4), dtype=tl.float32)
    acc_up = acc
    squares = tl.zeros((BLOCK_W,), dtype=tl.float32)
    acc, acc_up, squares = add_block(
        acc,
        acc_up,
        squares,
        w,
        w_up,
        x,
        norm_weight,
        scale,
        zero_point,
        rows,
        N,
        first,
        first_units,
        WORDS,
        UNITS,
        GROUP_UNITS,
        BLOCK_N,
        BLOCK_W,
        GATED,
        NORM,
        ASYMMETRIC,
    )
    if WORDS > BLOCK_W:
        for start in tl.range(BLOCK_W, WORDS, BLOCK_W, loop_unroll_factor=UNROLL):
            words = start + first
            w = load_words(weight, rows, words, WORDS, BLOCK_W)
            w_up = w
            if GATED:
                w_up = load_words(weight, rows + N, words, WORDS, BLOCK_W)
            acc, acc_up, squares = add_block(
                acc,
                acc_up,
                squares,
                w,
                w_up,
                x,
                norm_weight,
                scale,
                zero_point,
                rows,
                N,
                words,
                start // 4 + first_units,
                WORDS,
                UNITS,
                GROUP_UNITS,
                BLOCK_N,
                BLOCK_W,
                GATED,
                NORM,
                ASYMMETRIC,
            )
    factor = 16.0
    if NORM:
        factor = 16.0 * tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    y = tl.sum(acc, axis=1) * factor
    if BIAS:
        y += tl.load(bias + rows).to(tl.float32)
    if GATED:
        up = tl.sum(acc_up, axis=1) * factor
        if BIAS:
            up += tl.load(bias + N + rows).to(tl.float32)
        y = silu(y) * up
    if RESIDUAL:
        y += tl.load(residual + rows).to(tl.float32)
    tl.store(out + wanted, y.to(out.dtype.element_ty), mask=wanted < N)


@triton.jit
def spread(values, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """[BLOCK_N, BLOCK_W / 4], a value a unit, to [BLOCK_N, BLOCK_W], one a word."""
    wide = tl.broadcast_to(values[:, :, None], (BLOCK_N, BLOCK_W // 4, 4))
    return tl.reshape(wide, (BLOCK_N, BLOCK_W))


@triton.jit
def dequantised(w, s, z, nibble: tl.constexpr, dtype: tl.constexpr):
    """(code - 8 - zero) · scale, rounded once."""
    return ((raised(w, nibble) * 16.0 - (24.0 + z)) * s).to(dtype)


@triton.jit(do_not_specialize=["M"])
def w4a16_few_rows_kernel(
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
    GROUP_UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`linear_kernels.few_rows_kernel` for weights of 4 bits: a product of BLOCK_W columns for each nibble."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    WORDS: tl.constexpr = K // 8
    UNITS: tl.constexpr = K // 32
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.arange(0, BLOCK_M)
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows = tl.minimum(wanted, N - 1)
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up = y
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    x_rows = x + tl.minimum(rows, M - 1)[None, :] * x_stride
    for start in tl.range(0, WORDS, BLOCK_W, num_stages=STAGES):
        words = start + tl.arange(0, BLOCK_W)
        units = start // 4 + tl.arange(0, BLOCK_W // 4)
        w = load_words(weight, weight_rows, words, WORDS, BLOCK_W)
        s, z = load_groups(scale, zero_point, weight_rows, units, UNITS, GROUP_UNITS, ASYMMETRIC)
        s = spread(s, BLOCK_N, BLOCK_W)
        if ASYMMETRIC:
            z = spread(z, BLOCK_N, BLOCK_W)
        if GATED:
            w_up = load_words(weight, weight_rows + N, words, WORDS, BLOCK_W)
            s_up, z_up = load_groups(
                scale, zero_point, weight_rows + N, units, UNITS, GROUP_UNITS, ASYMMETRIC
            )
            s_up = spread(s_up, BLOCK_N, BLOCK_W)
            if ASYMMETRIC:
                z_up = spread(z_up, BLOCK_N, BLOCK_W)
        for nibble in tl.static_range(8):
            cols = words // 4 * 32 + 4 * nibble + words % 4
            at = x_rows + cols[:, None]
            a = tl.load(at) if WORDS % BLOCK_W == 0 else tl.load(at, mask=(words < WORDS)[:, None], other=0.0)
            if NORM:
                wide = a.to(tl.float32)
                squares += tl.sum(wide * wide, axis=0)
                gain = load_nibble_columns(norm_weight, words, nibble, WORDS, BLOCK_W)
                a = (wide * (gain * PRESCALE)[:, None]).to(dtype)
            y = tl.dot(dequantised(w, s, z, nibble, dtype), a, y)
            if GATED:
                up = tl.dot(dequantised(w_up, s_up, z_up, nibble, dtype), a, up)
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
def w4a16_dequantize_kernel(
    weight,
    scale,
    zero_point,
    out,
    first,
    N,
    K: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """Rows first to N of the weight, in out from its row 0 on, columns in their order."""
    WORDS: tl.constexpr = K // 8
    UNITS: tl.constexpr = K // 32
    wanted = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    words = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    units = tl.program_id(1) * (BLOCK_W // 4) + tl.arange(0, BLOCK_W // 4)
    w = load_words(weight, rows, words, WORDS, BLOCK_W)
    s, z = load_groups(scale, zero_point, rows, units, UNITS, GROUP_UNITS, ASYMMETRIC)
    s = spread(s, BLOCK_N, BLOCK_W)
    if ASYMMETRIC:
        z = spread(z, BLOCK_N, BLOCK_W)
    mask = (wanted < N)[:, None] & (words < WORDS)[None, :]
    for nibble in tl.static_range(8):
        cols = words // 4 * 32 + 4 * nibble + words % 4
        at = out + (wanted - first)[:, None].to(tl.int64) * K + cols[None, :]
        tl.store(at, dequantised(w, s, z, nibble, out.dtype.element_ty), mask=mask)
