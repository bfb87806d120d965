"""Routed experts with 8-bit weights and activations: ``w8a8_moe_experts``, activations quantised row by row.

Six launches: rows by expert, then for both projections the rows' codes and a grouped product, then the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymllm_kernels.triton.launch import ceil_div, power_of_2
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.moe import combine
from pymllm_kernels.triton.moe_kernels import find_rows, multiply
from pymllm_kernels.triton.moe_plan import grouped_blocks, max_blocks
from pymllm_kernels.triton.moe_route import ExpertRows, expert_rows
from pymllm_kernels.triton.norm import silu

ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: a float32 under 2^22 that is added to it is rounded to an integer, halves to the even one."""


@triton.jit
def quantise_rows_kernel(x, codes, scales, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """`nn.quant_ops.quantize_per_token_int8`, one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    wide = tl.load(x + row * x_stride + cols, mask=cols < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), axis=0)
    inverse = tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)
    rounded = (wide * inverse + ROUND) - ROUND
    tl.store(codes + row * K + cols, rounded.to(tl.int8), mask=cols < K)
    tl.store(scales + row, tl.div_rn(largest, 127.0))


@triton.jit
def grouped_int8_kernel(
    x, x_scale, weight, weight_scale, out, order, starts, counts, N,
    K: tl.constexpr, GATED: tl.constexpr, PAIRS_A_ROW: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
):  # fmt: skip
    """`moe_kernels.grouped_kernel` for codes: x [., K] int8, x_scale [.]; weight [E, N, K], weight_scale [E, N]."""
    expert, pairs, mask = find_rows(tl.program_id(0), order, starts, counts, E, BLOCK_E, BLOCK_M)
    if tl.sum(mask.to(tl.int32), axis=0) == 0:
        return
    x_rows = (pairs // PAIRS_A_ROW).to(tl.int64)
    wanted = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows = expert.to(tl.int64) * (2 * N if GATED else N) + tl.minimum(wanted, N - 1)
    left: tl.constexpr = BLOCK_N if WEIGHTS_LEFT else BLOCK_M
    right: tl.constexpr = BLOCK_M if WEIGHTS_LEFT else BLOCK_N
    y = tl.zeros((left, right), dtype=tl.int32)
    up = y
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_K)
        inside = (cols < K)[None, :]
        a = tl.load(x + x_rows[:, None] * K + cols[None, :], mask=mask[:, None] & inside, other=0)
        w = tl.load(weight + weight_rows[:, None] * K + cols[None, :], mask=inside, other=0)
        y = multiply(a, w, y, WEIGHTS_LEFT)
        if GATED:
            w = tl.load(weight + (weight_rows + N)[:, None] * K + cols[None, :], mask=inside, other=0)
            up = multiply(a, w, up, WEIGHTS_LEFT)
    if WEIGHTS_LEFT:
        y = tl.trans(y)
        if GATED:
            up = tl.trans(up)
    scale = tl.load(x_scale + x_rows)[:, None]
    result = y.to(tl.float32) * scale * tl.load(weight_scale + weight_rows)[None, :]
    if GATED:
        result = silu(result) * (up.to(tl.float32) * scale * tl.load(weight_scale + weight_rows + N)[None, :])
    tl.store(
        out + pairs.to(tl.int64)[:, None] * N + wanted[None, :],
        result.to(out.dtype.element_ty),
        mask=mask[:, None] & (wanted < N)[None, :],
    )


@dataclass(frozen=True, slots=True)
class Int8Experts:
    """One projection of all experts: weight [E, N, K] int8, scale [E, N] float32."""

    weight: Tensor
    scale: Tensor


class TritonW8A8Experts:
    """`protocols.kernel.ExpertsKernel` for weights and activations of 8 bits, both symmetric."""

    graph_safe = True

    def pack(self, gate_up: dict[str, Tensor], down: dict[str, Tensor]) -> tuple[Int8Experts, Int8Experts]:
        first, second = (
            Int8Experts(tensors["weight"].contiguous(), tensors["weight_scale"].contiguous())
            for tensors in (gate_up, down)
        )
        return first, second

    def apply(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        packed: tuple[Int8Experts, Int8Experts],
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        (tokens, top_k), columns = ids.shape, x.shape[1]
        gate_up, down = packed
        weights, ids = weights.contiguous(), ids.contiguous()
        out = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
        if not tokens:
            return out
        experts, width = gate_up.weight.shape[0], gate_up.weight.shape[1] // 2
        rows = expert_rows(ids, experts)
        hidden = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
        grouped(*quantise_rows(unit_stride(x)), rows, gate_up, hidden, gated=True, top_k=top_k)
        results = torch.empty((tokens * top_k, columns), dtype=x.dtype, device=x.device)
        grouped(*quantise_rows(hidden), rows, down, results, gated=False, top_k=top_k)
        combine(results, weights, None if residual is None else unit_stride(residual), out)
        return out


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K], whose rows may lie apart, to codes [M, K] int8 and scales [M] float32."""
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = power_of_2(columns)
    quantise_rows_kernel[(rows,)](
        x, codes, scales, x.stride(0), K=columns, BLOCK=block, num_warps=min(max(block // 512, 1), 16)
    )
    return codes, scales


def grouped(
    x: Tensor,
    scale: Tensor,
    rows: ExpertRows,
    packed: Int8Experts,
    out: Tensor,
    *,
    gated: bool,
    top_k: int,
) -> None:
    """Fill out [T k, N] with the product of each pair; x has a row a token where gated, else one a pair."""
    (pairs, n), (experts, _, columns) = out.shape, packed.weight.shape
    blocks = grouped_blocks(pairs // top_k, top_k, experts, n, 128, 8, gated=gated)
    grid = (max_blocks(pairs, experts, blocks.block_m), ceil_div(n, blocks.block_n))
    grouped_int8_kernel[grid](
        x,
        scale,
        packed.weight,
        packed.scale,
        out,
        rows.order,
        rows.starts,
        rows.counts,
        n,
        K=columns,
        GATED=gated,
        PAIRS_A_ROW=top_k if gated else 1,
        E=experts,
        BLOCK_E=power_of_2(experts),
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        STAGES=blocks.stages,
        WEIGHTS_LEFT=blocks.weights_left,
        num_warps=blocks.warps,
    )
