"""Routed experts on a GPU: ``moe_experts``, ``w4a16_moe_experts`` and ``w8a16_moe_experts``.

Two launches for few tokens, four for many. Nothing is read by the host and every grid follows from shapes
alone, so that a CUDA graph can hold them; sums over a token's experts have a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.moe_kernels import (
    combine_kernel,
    few_down_kernel,
    few_gate_up_kernel,
    grouped_kernel,
)
from pymllm_kernels.triton.moe_plan import MAX_FEW_TOKENS, grouped_blocks, max_blocks, vector_blocks
from pymllm_kernels.triton.moe_route import ExpertRows, expert_rows


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One projection of all experts. weight: [E, N, ...] as in `moe_kernels`; columns: K; group: K where none."""

    weight: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    columns: int
    group: int
    bits: int


@dataclass(frozen=True, slots=True)
class Packed:
    gate_up: ExpertWeights
    down: ExpertWeights


class TritonExperts:
    """`protocols.kernel.ExpertsKernel` for weights of 16 bits."""

    graph_safe = True

    def pack(self, gate_up: dict[str, Tensor], down: dict[str, Tensor]) -> Packed:
        return Packed(self.packed(gate_up), self.packed(down))

    def packed(self, tensors: dict[str, Tensor]) -> ExpertWeights:
        weight = tensors["weight"].contiguous()
        return ExpertWeights(weight, None, None, weight.shape[2], weight.shape[2], 16)

    def apply(
        self, x: Tensor, weights: Tensor, ids: Tensor, packed: Packed, *, residual: Tensor | None = None
    ) -> Tensor:
        tokens, top_k = ids.shape
        x, weights, ids = unit_stride(x), weights.contiguous(), ids.contiguous()
        if residual is not None:
            residual = unit_stride(residual)
        out = torch.empty((tokens, x.shape[1]), dtype=x.dtype, device=x.device)
        if not tokens:
            return out
        width = packed.gate_up.weight.shape[1] // 2
        hidden = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
        if tokens <= MAX_FEW_TOKENS[packed.gate_up.bits]:
            few_gate_up(x, ids, packed.gate_up, hidden)
            few_down(hidden, weights, ids, packed.down, residual, out)
            return out
        rows = expert_rows(ids, packed.gate_up.weight.shape[0])
        grouped(x, rows, packed.gate_up, hidden, gated=True, top_k=top_k)
        results = torch.empty((tokens * top_k, x.shape[1]), dtype=x.dtype, device=x.device)
        grouped(hidden, rows, packed.down, results, gated=False, top_k=top_k)
        combine(results, weights, residual, out)
        return out


class TritonInt8Experts(TritonExperts):
    """The same for ``w8a16_moe_experts``: int8 codes."""

    def packed(self, tensors: dict[str, Tensor]) -> ExpertWeights:
        weight, scale = tensors["weight"].contiguous(), tensors["scale"].contiguous()
        columns = weight.shape[2]
        return ExpertWeights(weight, scale, tensors.get("zero_point"), columns, columns // scale.shape[2], 8)


class TritonInt4Experts(TritonExperts):
    """The same for ``w4a16_moe_experts``: two codes a byte."""

    def packed(self, tensors: dict[str, Tensor]) -> ExpertWeights:
        weight, scale = tensors["weight"].contiguous(), tensors["scale"].contiguous()
        columns = weight.shape[2] * 2
        repack_int4(weight)
        return ExpertWeights(weight, scale, tensors.get("zero_point"), columns, columns // scale.shape[2], 4)


def repack_int4(weight: Tensor) -> None:
    """weight [E, N, K / 2] uint8, the even column of two in the low half, to the kernels' order, in place.

    Of 32 columns the first 16 come into the low halves, the others into the high ones: so the columns of either
    half lie side by side in x.
    """
    for expert in weight:  # one at a time, which bounds the memory that this takes
        rows = expert.view(expert.shape[0], -1, 16)
        columns = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(-2)
        torch.bitwise_or(columns[..., :16], columns[..., 16:] << 4, out=rows)


def few_gate_up(x: Tensor, ids: Tensor, packed: ExpertWeights, out: Tensor) -> None:
    """Fill out [T k, I] with silu(gate) · up of each token's experts."""
    pairs, n = out.shape
    k, group, bits = packed.columns, packed.group, packed.bits
    blocks = vector_blocks(n, k, group, bits, gpu(x.device).sms, pairs, gated=True)
    few_gate_up_kernel[(ceil_div(n, blocks.block_n), pairs)](
        x,
        ids,
        packed.weight,
        packed.scale,
        packed.zero_point,
        out,
        x.stride(0),
        n,
        K=k,
        GROUP=group,
        BITS=bits,
        ASYMMETRIC=packed.zero_point is not None,
        TOP_K=ids.shape[1],
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        SUB=blocks.sub,
        UNROLL=blocks.unroll,
        num_warps=blocks.warps,
    )


def few_down(
    x: Tensor, weights: Tensor, ids: Tensor, packed: ExpertWeights, residual: Tensor | None, out: Tensor
) -> None:
    """Fill out [T, H] with the weighted sums over each token's experts, of x [T k, I]."""
    tokens, n = out.shape
    k, group, bits = packed.columns, packed.group, packed.bits
    blocks = vector_blocks(n, k, group, bits, gpu(x.device).sms, tokens, gated=False)
    few_down_kernel[(ceil_div(n, blocks.block_n), tokens)](
        x,
        weights,
        ids,
        packed.weight,
        packed.scale,
        packed.zero_point,
        residual,
        out,
        0 if residual is None else residual.stride(0),
        n,
        K=k,
        GROUP=group,
        BITS=bits,
        ASYMMETRIC=packed.zero_point is not None,
        TOP_K=ids.shape[1],
        RESIDUAL=residual is not None,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        SUB=blocks.sub,
        UNROLL=blocks.unroll,
        num_warps=blocks.warps,
    )


def grouped(
    x: Tensor, rows: ExpertRows, packed: ExpertWeights, out: Tensor, *, gated: bool, top_k: int
) -> None:
    """Fill out [T k, N] with the product of each pair; x has a row a token where gated, else one a pair."""
    pairs, n = out.shape
    k, group, bits = packed.columns, packed.group, packed.bits
    experts = packed.weight.shape[0]
    blocks = grouped_blocks(pairs // top_k, top_k, experts, n, group, bits, gated=gated)
    grid = (max_blocks(pairs, experts, blocks.block_m), ceil_div(n, blocks.block_n))
    grouped_kernel[grid](
        x,
        packed.weight,
        packed.scale,
        packed.zero_point,
        out,
        rows.order,
        rows.starts,
        rows.counts,
        x.stride(0),
        n,
        K=k,
        GROUP=group,
        BITS=bits,
        ASYMMETRIC=packed.zero_point is not None,
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


def combine(y: Tensor, weights: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """Fill out [T, H] with residual + Σ weights [T, k] · y [T k, H]."""
    tokens, n = out.shape
    block = min(power_of_2(n), 1024)
    combine_kernel[(tokens, ceil_div(n, block))](
        y,
        weights,
        residual,
        out,
        0 if residual is None else residual.stride(0),
        N=n,
        TOP_K=weights.shape[1],
        RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=4,
    )
