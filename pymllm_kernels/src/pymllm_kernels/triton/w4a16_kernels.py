"""Device code of W4A16: weights of 4 bits are widened in registers, or into a buffer for cuBLAS.

A unit is 128 columns of a row, 32 words of 16 bits: nibble i of word j is the code, 0 to 15, of the unit's
column 32 i + j. One nibble of all words is then a tile of 32 neighbouring columns, whose factors are 32
neighbouring values of x, and no value has to move between threads. K is padded to whole units.

Scales and zero points are one word of 32 bits a group and row, [G, rows], so that a tile's are neighbours and
asynchronous copies, of 4 bytes at least, can bring them: the scale's bits are the lower half, those of what
`centred` adds, in the same dtype, the upper.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.linear_kernels import PRESCALE, finish_rows


@triton.constexpr_function
def widening(nibble: int, bf16: bool, minus_eight: bool) -> str:
    """PTX that makes two codes of two words (in $1) values of 16 bits, code - 8 or code + the value in $2.

    A code in the lowest bits of the fraction of 128 in bfloat16, or of 1024 in float16, adds itself: no
    conversion, and two codes an instruction (Kim et al., "Who Says Elephants Can't Run", 2022, section 3).
    0xEA is (a & b) | c.
    """
    base, one, offset, kind = (
        (0x4300, 0x3F80, 0xC308, "bf16x2") if bf16 else (0x6400, 0x3C00, 0xE408, "f16x2")
    )
    shift = f"shr.u32 t, $1, {4 * nibble}; " if nibble else "mov.b32 t, $1; "
    return (
        "{ .reg .b32 t, one, off; "
        + shift
        + f"lop3.b32 t, t, 0x000F000F, {base:#06x}{base:04x}, 0xEA; mov.b32 one, {one:#06x}{one:04x}; "
        + (f"mov.b32 off, {offset:#06x}{offset:04x}; " if minus_eight else "mov.b32 off, $2; ")
        + f"fma.rn.{kind} $0, t, one, off; }}"
    )


@triton.jit
def centred(
    w, offset, nibble: tl.constexpr, dtype: tl.constexpr, ASYMMETRIC: tl.constexpr, ASM: tl.constexpr
):
    """code - 8 - zero point of one nibble, exactly. offset: - zero point - 8, less 128 or 1024."""
    BF16: tl.constexpr = dtype == tl.bfloat16
    VALUE = tl.bfloat16 if BF16 else tl.float16
    if ASM:
        if ASYMMETRIC:
            o = tl.broadcast_to(offset, w.shape)
            return tl.inline_asm_elementwise(widening(nibble, BF16, False), "=r,r,r", [w, o], VALUE, True, 2)
        else:
            return tl.inline_asm_elementwise(widening(nibble, BF16, True), "=r,r", [w], VALUE, True, 2)
    else:
        code = ((w >> (4 * nibble)) & 15).to(tl.float32)
        if ASYMMETRIC:
            return (code + (offset.to(tl.float32) + (128.0 if BF16 else 1024.0))).to(dtype)
        else:
            return (code - 8.0).to(dtype)


@triton.jit
def halves(constants, dtype: tl.constexpr):
    """The scale in float32 and the offset in dtype, of the words of `constants`."""
    scale = constants.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return scale, (constants >> 16).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def prefetch_rows(weight, rows, ROW_WORDS: tl.constexpr, LINES: tl.constexpr):
    """Ask for the first LINES lines of 128 bytes of the rows; the second-level cache takes them meanwhile."""
    lines = tl.minimum(tl.arange(0, LINES) * 64, ROW_WORDS - 1)
    at = weight + rows[:, None].to(tl.int64) * ROW_WORDS + lines[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, False, 1
    )


@triton.jit(do_not_specialize=["M", "N"])
def w4a16_few_rows_kernel(
    x,
    weight,
    constants,
    out,
    norm_weight,
    bias,
    residual,
    eps,
    M,
    N,
    constants_stride,
    x_stride,
    residual_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    """`linear_kernels.few_rows_kernel` for weights of 4 bits; NORM only for one row.

    A step covers BLOCK_U units, whose products are batches of one product: the compiler gives each batch to
    a warp, so that the warps of a program share K, and their sums are added once, at the end. Products are
    of integers less zero points, which are exact; the scale multiplies their sums in float32.
    """
    if PDL:
        gdc_launch_dependents()
    UNITS: tl.constexpr = (K + 127) // 128
    GROUPS: tl.constexpr = K // GROUP
    # Nibbles of a unit that share a scale.
    SHARING: tl.constexpr = 4 if GROUP % 128 == 0 else 2 if GROUP % 64 == 0 else 1
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows = tl.minimum(wanted, N - 1)
    if PDL:
        prefetch_rows(weight, weight_rows, UNITS * 32, 8)
        if GATED:
            prefetch_rows(weight, weight_rows + N, UNITS * 32, 8)
        gdc_wait()
    words = tl.arange(0, 32)
    row_words = weight_rows[None, :, None].to(tl.int64) * (UNITS * 32) + words[None, None, :]
    acc = tl.zeros((BLOCK_U, BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc_up = acc
    squares = tl.zeros((BLOCK_U * 128,), dtype=tl.float32)
    for start in tl.range(0, UNITS, BLOCK_U, num_stages=STAGES):
        unit = start + tl.arange(0, BLOCK_U)
        whole = (unit < UNITS)[:, None, None]
        at_units = weight + (row_words + (unit * 32)[:, None, None])
        w = load_units(at_units, whole, UNITS, BLOCK_U)
        w_up = w
        if GATED:
            w_up = load_units(at_units + N.to(tl.int64) * (UNITS * 32), whole, UNITS, BLOCK_U)
        if NORM:
            cols = start * 128 + tl.arange(0, BLOCK_U * 128)
            if K % (BLOCK_U * 128) == 0:
                plain = tl.load(x + cols).to(tl.float32)
            else:
                plain = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
            squares += plain * plain
        y = tl.zeros((BLOCK_U, BLOCK_N, BLOCK_M), dtype=tl.float32)
        up = y
        for nibble in tl.static_range(4):
            col = (unit * 128)[:, None] + nibble * 32 + words[None, :]
            mask = (rows < M)[None, None, :]
            if K % (BLOCK_U * 128) != 0:
                mask = mask & (col < K)[:, :, None]
            a = tl.load(x + (rows[None, None, :] * x_stride + col[:, :, None]), mask=mask, other=0.0)
            if NORM:
                # One for each row of x, though they are the same: so they are copied as x is.
                at_gain = norm_weight + (rows[None, None, :] * 0 + col[:, :, None])
                gain = tl.load(at_gain, mask=mask, other=0.0)
                a = gained(a, gain, ASM)
            if nibble % SHARING == 0:
                group = tl.minimum((unit * 128 + nibble * 32) // GROUP, GROUPS - 1)
                # Beyond N lie other rows, or padding: what is read there is not stored.
                at_group = constants + (group[:, None] * constants_stride + wanted[None, :])
                s, offset = halves(tl.load(at_group), dtype)
                if GATED:
                    s_up, offset_up = halves(tl.load(at_group + N), dtype)
            y = tl.dot(centred(w, offset[:, :, None], nibble, dtype, ASYMMETRIC, ASM), a, y)
            if GATED:
                up = tl.dot(centred(w_up, offset_up[:, :, None], nibble, dtype, ASYMMETRIC, ASM), a, up)
            if nibble % SHARING == SHARING - 1:
                acc += y * s[:, :, None]
                y = tl.zeros((BLOCK_U, BLOCK_N, BLOCK_M), dtype=tl.float32)
                if GATED:
                    acc_up += up * s_up[:, :, None]
                    up = y
    total = tl.sum(acc, axis=0)
    total_up = total
    if GATED:
        total_up = tl.sum(acc_up, axis=0)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        if dtype == tl.float16:
            factor /= PRESCALE
        total *= factor
        total_up *= factor
    finish_rows(
        total,
        total_up,
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
        False,
        BIAS,
        RESIDUAL,
    )


@triton.jit
def load_units(at, whole, UNITS: tl.constexpr, BLOCK_U: tl.constexpr):
    if UNITS % BLOCK_U == 0:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=whole, other=0, eviction_policy="evict_first")


@triton.jit
def gained(a, gain, ASM: tl.constexpr):
    """x times the norm's weight, rounded once; in float16 times PRESCALE, too."""
    if a.dtype == tl.bfloat16 and ASM:
        # The product's sum with -0 is the product: capability 8.0 has no mul.bf16x2.
        asm: tl.constexpr = "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [a, gain], tl.bfloat16, True, 2)
    elif a.dtype == tl.float16:
        return (a.to(tl.float32) * (gain.to(tl.float32) * PRESCALE)).to(a.dtype)
    else:
        return (a.to(tl.float32) * gain.to(tl.float32)).to(a.dtype)


@triton.jit(do_not_specialize=["first", "N"])
def w4a16_dequantize_kernel(
    weight,
    constants,
    out,
    first,
    N,
    constants_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ASM: tl.constexpr,
):
    """Rows first to N of the weight, in out from its row 0 on, columns in their order."""
    UNITS: tl.constexpr = (K + 127) // 128
    GROUPS: tl.constexpr = K // GROUP
    SHARING: tl.constexpr = 4 if GROUP % 128 == 0 else 2 if GROUP % 64 == 0 else 1
    dtype: tl.constexpr = out.dtype.element_ty
    wanted = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    word = tl.arange(0, 32)
    at = rows[:, None, None].to(tl.int64) * (UNITS * 32) + (unit * 32)[None, :, None] + word[None, None, :]
    w = load_units(weight + at, (unit < UNITS)[None, :, None], UNITS, BLOCK_U)
    at = out + (wanted - first)[:, None, None].to(tl.int64) * K
    for nibble in tl.static_range(4):
        if nibble % SHARING == 0:
            group = tl.minimum((unit * 128 + nibble * 32) // GROUP, GROUPS - 1)
            at_group = constants + (group[None, :] * constants_stride + rows[:, None])
            s, offset = halves(tl.load(at_group), dtype)
        value = centred(w, offset[:, :, None], nibble, dtype, ASYMMETRIC, ASM).to(tl.float32) * s[:, :, None]
        col = (unit * 128)[None, :, None] + nibble * 32 + word[None, None, :]
        tl.store(at + col, value.to(dtype), mask=(wanted < N)[:, None, None] & (col < K))
