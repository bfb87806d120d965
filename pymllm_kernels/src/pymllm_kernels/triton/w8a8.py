"""The operation ``w8a8_linear``: one launch for one row, quantisation and an integer product for more."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.linear_plan import Blocks, few_rows_blocks, fitted
from pymllm_kernels.triton.quantize import StaticInput, quantize_rows
from pymllm_kernels.triton.w8a8_kernels import w8a8_few_rows_kernel, w8a8_matmul_kernel, w8a8_matvec_kernel

MAX_NARROW_ROWS = 64
"""Up to so many rows a program takes all of them, with the weight as the left operand."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """The tensors of ``w8a8_linear`` (`nn.ops`); weight rows are [gate; up] where gated."""

    weight: Tensor
    scale: Tensor
    sum: Tensor | None
    bias: Tensor | None
    static: StaticInput
    gated: bool

    @property
    def out_features(self) -> int:
        rows = self.weight.shape[0]
        return rows // 2 if self.gated else rows


class TritonW8A8:
    """`protocols.kernel.LinearKernel` for ``w8a8_linear``, activations dynamic or static."""

    fuses = frozenset({"norm", "bias", "silu_mul", "residual"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> Int8Weight:
        return Int8Weight(
            weight=tensors["weight"].contiguous(),
            scale=tensors["weight_scale"].contiguous(),
            sum=tensors.get("weight_sum"),
            bias=tensors.get("bias"),
            static=StaticInput(tensors.get("input_scale"), tensors.get("input_zero_point")),
            gated=act is not None,
        )

    def apply(
        self,
        x: Tensor,
        packed: Int8Weight,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        rows, columns = x.shape
        n, sms = packed.out_features, gpu(x.device).sms
        out = torch.empty((rows, n), dtype=out_dtype or x.dtype, device=x.device)
        if rows == 1:
            matvec(x, packed, norm, residual, out, matvec_blocks(n, columns, sms, gated=packed.gated))
        elif rows:
            matmul(x, packed, norm, residual, out, matmul_blocks(rows, n, columns, sms, gated=packed.gated))
        return out


def matvec_blocks(n: int, k: int, sms: int, *, gated: bool) -> Blocks:
    """For one row. As for dense weights, but each program quantises the row: rather fewer, larger ones."""
    block_k = power_of_2(max(k, 64))
    if block_k > 2048:
        block_k = next((size for size in (2048, 1024, 512) if k % size == 0), 1024)
    matrices = 2 if gated else 1
    block_n = max(16384 // (block_k * matrices), 1)
    while block_n > 1 and 10 * ceil_div(n, block_n) < 9 * sms:
        block_n //= 2
    return Blocks(min(block_n, 16), block_k, warps=4)


def matmul_blocks(m: int, n: int, k: int, sms: int, *, gated: bool) -> tuple[int, Blocks]:
    """BLOCK_M and the other blocks for more than one row."""
    matrices = 2 if gated else 1
    if m <= MAX_NARROW_ROWS:
        # Bound by reading the weights, as decodes are; a step reads twice the columns of bfloat16 weights.
        blocks = few_rows_blocks(n, ceil_div(k, 2), sms, gated=gated)
        blocks = dataclasses.replace(blocks, block_k=max(2 * blocks.block_k, 32))
        return max(power_of_2(m), 16), blocks
    block_m = 128
    # Two accumulators share the registers of one.
    return block_m, Blocks(128 // matrices, min(128, power_of_2(max(k, 32))), warps=8, stages=3)


def matvec(
    x: Tensor, packed: Int8Weight, norm: Norm | None, residual: Tensor | None, out: Tensor, blocks: Blocks
) -> None:
    """Fill out [1, n] for x [1, K]."""
    n, device = out.shape[1], gpu(x.device)
    norm_weight, eps = norm or (None, 0.0)
    w8a8_matvec_kernel[(ceil_div(n, blocks.block_n),)](
        unit_stride(x),
        packed.weight,
        packed.scale,
        packed.sum,
        out,
        norm_weight,
        packed.bias,
        None if residual is None else unit_stride(residual),
        eps,
        packed.static.scale,
        packed.static.zero_point,
        n,
        K=x.shape[1],
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        GATED=packed.gated,
        NORM=norm is not None,
        STATIC=packed.static.scale is not None,
        ASYMMETRIC=packed.sum is not None,
        BIAS=packed.bias is not None,
        RESIDUAL=residual is not None,
        PDL=device.pdl,
        num_warps=blocks.warps,
        launch_pdl=device.pdl,
    )


def matmul(
    x: Tensor,
    packed: Int8Weight,
    norm: Norm | None,
    residual: Tensor | None,
    out: Tensor,
    sizes: tuple[int, Blocks],
) -> None:
    """Fill out [M, n] for x [M, K]: quantise the rows, then multiply."""
    (rows, n), device = out.shape, gpu(x.device)
    block_m, blocks = sizes
    blocks = fitted(blocks, block_m, 1, device.shared, gated=packed.gated)
    codes, scales, zeros = quantize_rows(
        unit_stride(x), norm, packed.static, asymmetric=packed.sum is not None
    )
    residual = None if residual is None else unit_stride(residual)
    arguments = (
        codes,
        packed.weight,
        scales,
        zeros,
        packed.scale,
        packed.sum,
        out,
        packed.bias,
        residual,
        rows,
        n,
        0 if residual is None else residual.stride(0),
    )
    options = {
        "K": x.shape[1],
        "BLOCK_M": block_m,
        "BLOCK_N": blocks.block_n,
        "BLOCK_K": blocks.block_k,
        "STAGES": blocks.stages,
        "GATED": packed.gated,
        "ASYMMETRIC": packed.sum is not None,
        "BIAS": packed.bias is not None,
        "RESIDUAL": residual is not None,
        "PDL": device.pdl,
        "num_warps": blocks.warps,
        "launch_pdl": device.pdl,
    }
    columns = ceil_div(n, blocks.block_n)
    if rows <= MAX_NARROW_ROWS:
        w8a8_few_rows_kernel[(columns,)](*arguments, **options)
    else:
        w8a8_matmul_kernel[(ceil_div(rows, block_m) * columns,)](*arguments, GROUP_M=8, **options)
