"""Device code of routed experts: for few tokens an expert's rows times one vector, for many grouped products.

Weights are [E, N, K] in the computation's dtype (BITS 16), int8 codes (8), or bytes of two 4-bit codes (4) in
the order of `moe.repack_int4`: byte 16 b + j of a row holds column 32 b + j in its low half, offset by 8, and
column 32 b + 16 + j in its high half. scale and zero_point are [E, N, G], one for GROUP columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymllm_kernels.triton.norm import silu


@triton.jit
def load_codes(at, mask, BITS: tl.constexpr):
    """Codes of 4 bits as two tiles, of 8 as one (twice), in float32 without their offset."""
    codes = tl.load(at, mask=mask, other=0, eviction_policy="evict_first")
    if BITS == 4:
        low = (codes & 15).to(tl.float32) - 8.0
        high = (codes >> 4).to(tl.float32) - 8.0
    else:
        low = codes.to(tl.float32)
        high = low
    return low, high


@triton.jit
def byte_columns(bytes_):
    """The column in the low half of each byte of a row; the one in its high half is 16 further."""
    return bytes_ // 16 * 32 + bytes_ % 16


@triton.jit
def vector_sums(
    x, weight, scale, zero_point, rows, start,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Products of BLOCK_N rows with x over BLOCK_K columns from `start`, as sums over SUB columns each."""
    if BITS == 16:
        cols = start + tl.arange(0, BLOCK_K)
        mask = cols < K
        at = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
        w = tl.load(at, mask=mask[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
        xs = tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)
        return tl.sum(tl.reshape(w * xs[None, :], (BLOCK_N, BLOCK_K // SUB, SUB)), axis=2)
    else:
        parts: tl.constexpr = BLOCK_K // SUB
        groups = (start + tl.arange(0, parts) * SUB) // GROUP
        group_at = rows[:, None] * (K // GROUP) + groups[None, :]
        group_mask = (groups < K // GROUP)[None, :]
        s = tl.load(scale + group_at, mask=group_mask, other=0.0).to(tl.float32)
        width: tl.constexpr = SUB * BITS // 8
        bytes_ = start * BITS // 8 + tl.arange(0, BLOCK_K * BITS // 8)
        mask = bytes_ < K * BITS // 8
        at = weight + rows[:, None].to(tl.int64) * (K * BITS // 8) + bytes_[None, :]
        low, high = load_codes(at, mask[None, :], BITS)
        cols = byte_columns(bytes_) if BITS == 4 else bytes_
        xs = tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)
        products = low * xs[None, :]
        total = xs
        if BITS == 4:
            xs_high = tl.load(x + cols + 16, mask=mask, other=0.0).to(tl.float32)
            products += high * xs_high[None, :]
            total += xs_high
        y = tl.sum(tl.reshape(products, (BLOCK_N, parts, width)), axis=2)
        if ASYMMETRIC:
            z = tl.load(zero_point + group_at, mask=group_mask, other=0).to(tl.float32)
            y -= z * tl.sum(tl.reshape(total, (parts, width)), axis=1)[None, :]
        return y * s


@triton.jit
def few_gate_up_kernel(
    x, ids, weight, scale, zero_point, out, x_stride, N,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out [T k, N] = silu(gate) · up for each pair of a token and one of its experts; weight: [E, 2 N, K]."""
    pair = tl.program_id(1)
    expert = tl.load(ids + pair).to(tl.int64)
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    x += (pair // TOP_K).to(tl.int64) * x_stride
    weight += expert * 2 * N * (K * BITS // 8 if BITS < 16 else K)
    if BITS < 16:
        scale += expert * 2 * N * (K // GROUP)
        if ASYMMETRIC:
            zero_point += expert * 2 * N * (K // GROUP)
    gate = tl.zeros((BLOCK_N, BLOCK_K // SUB), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K // SUB), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        gate += vector_sums(
            x, weight, scale, zero_point, rows, start, K, GROUP, BITS, ASYMMETRIC, BLOCK_N, BLOCK_K, SUB
        )
        up += vector_sums(
            x, weight, scale, zero_point, rows + N, start, K, GROUP, BITS, ASYMMETRIC, BLOCK_N, BLOCK_K, SUB
        )
    y = silu(tl.sum(gate, axis=1)) * tl.sum(up, axis=1)
    tl.store(out + pair.to(tl.int64) * N + wanted, y.to(out.dtype.element_ty), mask=wanted < N)


@triton.jit
def few_down_kernel(
    x, weights, ids, weight, scale, zero_point, residual, out, residual_stride, N,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, TOP_K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out [T, N] = residual + Σ over a token's experts of weights · (x @ weight.T); x: [T k, K], weight: [E, N, K].

    One program sums over all experts of a token, so that the order of the sum never changes.
    """
    token = tl.program_id(1).to(tl.int64)
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(wanted, N - 1)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for place in tl.range(0, TOP_K):
        pair = token * TOP_K + place
        expert = tl.load(ids + pair).to(tl.int64)
        share = tl.load(weights + pair)
        mine = weight + expert * N * (K * BITS // 8 if BITS < 16 else K)
        my_scale = scale
        my_zero_point = zero_point
        if BITS < 16:
            my_scale = scale + expert * N * (K // GROUP)
            if ASYMMETRIC:
                my_zero_point = zero_point + expert * N * (K // GROUP)
        acc = tl.zeros((BLOCK_N, BLOCK_K // SUB), dtype=tl.float32)
        for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
            acc += vector_sums(
                x + pair * K, mine, my_scale, my_zero_point, rows, start,
                K, GROUP, BITS, ASYMMETRIC, BLOCK_N, BLOCK_K, SUB,
            )  # fmt: skip
        total += share * tl.sum(acc, axis=1)
    if RESIDUAL:
        total += tl.load(residual + token * residual_stride + rows).to(tl.float32)
    tl.store(out + token * N + wanted, total.to(out.dtype.element_ty), mask=wanted < N)


@triton.jit
def weight_tile(
    weight, scale, zero_point, rows, start, dtype: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of weights over BLOCK_K columns of one group, dequantised: low and high halves, or one tile twice."""
    if BITS == 16:
        cols = start + tl.arange(0, BLOCK_K)
        at = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
        low = tl.load(at, mask=(cols < K)[None, :], other=0.0)
        high = low
    else:
        bytes_ = start * BITS // 8 + tl.arange(0, BLOCK_K * BITS // 8)
        at = weight + rows[:, None].to(tl.int64) * (K * BITS // 8) + bytes_[None, :]
        low, high = load_codes(at, (bytes_ < K * BITS // 8)[None, :], BITS)
        group_at = rows * (K // GROUP) + start // GROUP
        s = tl.load(scale + group_at).to(tl.float32)[:, None]
        if ASYMMETRIC:
            z = tl.load(zero_point + group_at).to(tl.float32)[:, None]
            low -= z
            high -= z
        # Rounded once, as `nn.quant_ops.dequantize` does.
        low = (low * s).to(dtype)
        high = (high * s).to(dtype)
    return low, high


@triton.jit
def multiply(a, w, acc, WEIGHTS_LEFT: tl.constexpr):
    """acc + a @ w.T, or its transpose: for few rows of a, the weights fill the tensor cores' tile."""
    if WEIGHTS_LEFT:
        return tl.dot(w, tl.trans(a), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(a, tl.trans(w), acc, out_dtype=acc.dtype)


@triton.jit
def multiply_halves(a, a_high, low, high, acc, BITS: tl.constexpr, WEIGHTS_LEFT: tl.constexpr):
    acc = multiply(a, low, acc, WEIGHTS_LEFT)
    if BITS == 4:
        acc = multiply(a_high, high, acc, WEIGHTS_LEFT)
    return acc


@triton.jit
def find_rows(
    block, order, starts, counts, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The expert of a block, its pairs [BLOCK_M] and which of them are there; none behind the last block."""
    experts = tl.arange(0, BLOCK_E)
    count = tl.load(counts + experts, mask=experts < E, other=0)
    blocks = (count + BLOCK_M - 1) // BLOCK_M
    before = (tl.cumsum(blocks, axis=0) <= block).to(tl.int32)
    expert = tl.minimum(tl.sum(before, axis=0), E - 1)
    rows = (block - tl.sum(blocks * before, axis=0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < tl.load(counts + expert)) & (block < tl.sum(blocks, axis=0))
    pairs = tl.load(order + tl.load(starts + expert) + rows, mask=mask, other=0)
    return expert, pairs, mask


@triton.jit
def grouped_kernel(
    x, weight, scale, zero_point, out, order, starts, counts, x_stride, N,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    GATED: tl.constexpr, PAIRS_A_ROW: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
):  # fmt: skip
    """out[p] = act(x[p // PAIRS_A_ROW] @ weight[expert of p].T) for all pairs p, BLOCK_M of one expert a program.

    x: [., K]; out: [pairs, N]; weight: [E, N, K], or [E, 2 N, K] where GATED. The grid is as large as any
    routing needs; a program finds its expert from the counts, and programs behind the last block end at once.
    """
    expert, pairs, mask = find_rows(tl.program_id(0), order, starts, counts, E, BLOCK_E, BLOCK_M)
    if tl.sum(mask.to(tl.int32), axis=0) == 0:
        return
    at = x + (pairs // PAIRS_A_ROW).to(tl.int64)[:, None] * x_stride
    wanted = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows = tl.minimum(wanted, N - 1)
    matrix = expert.to(tl.int64) * (2 * N if GATED else N)
    weight += matrix * (K * BITS // 8 if BITS < 16 else K)
    if BITS < 16:
        scale += matrix * (K // GROUP)
        if ASYMMETRIC:
            zero_point += matrix * (K // GROUP)
    left: tl.constexpr = BLOCK_N if WEIGHTS_LEFT else BLOCK_M
    right: tl.constexpr = BLOCK_M if WEIGHTS_LEFT else BLOCK_N
    y = tl.zeros((left, right), dtype=tl.float32)
    up = y
    dtype: tl.constexpr = x.dtype.element_ty
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        # SIM108 asks for a ternary, both sides of which Triton's compiler would type.
        if BITS == 4:  # noqa: SIM108
            cols = byte_columns(start // 2 + tl.arange(0, BLOCK_K // 2))
        else:
            cols = start + tl.arange(0, BLOCK_K)
        x_mask = mask[:, None] & (cols < K)[None, :]
        a = tl.load(at + cols[None, :], mask=x_mask, other=0.0)
        a_high = a
        if BITS == 4:
            a_high = tl.load(at + cols[None, :] + 16, mask=x_mask, other=0.0)
        low, high = weight_tile(
            weight, scale, zero_point, weight_rows, start, dtype, K, GROUP, BITS, ASYMMETRIC, BLOCK_K
        )
        y = multiply_halves(a, a_high, low, high, y, BITS, WEIGHTS_LEFT)
        if GATED:
            low, high = weight_tile(
                weight, scale, zero_point, weight_rows + N, start, dtype, K, GROUP, BITS, ASYMMETRIC, BLOCK_K
            )
            up = multiply_halves(a, a_high, low, high, up, BITS, WEIGHTS_LEFT)
    if GATED:
        y = silu(y) * up
    if WEIGHTS_LEFT:
        y = tl.trans(y)
    tl.store(
        out + pairs.to(tl.int64)[:, None] * N + wanted[None, :],
        y.to(out.dtype.element_ty),
        mask=mask[:, None] & (wanted < N)[None, :],
    )


@triton.jit
def combine_kernel(
    y, weights, residual, out, residual_stride,
    N: tl.constexpr, TOP_K: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, N] = residual + Σ over places of weights [T, k] · y [T k, N], in the order of the places."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        share = tl.load(weights + token * TOP_K + place)
        total += share * tl.load(y + (token * TOP_K + place) * N + cols, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + token * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * N + cols, total.to(out.dtype.element_ty), mask=mask)
