"""The operation ``w8a16_linear``: one launch for few rows; for many the weights are widened for cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.linear_plan import MAX_FEW_ROWS, Blocks, few_rows_blocks, fitted
from pymllm_kernels.triton.w8a16_kernels import (
    w8a16_dequantize_kernel,
    w8a16_few_rows_kernel,
    w8a16_matvec_kernel,
)
from pymllm_kernels.triton.widened import many_rows


@dataclass(frozen=True, slots=True)
class Int8Codes:
    """weight: [N, K] int8, rows [gate; up] where gated. scale: [N, G]. zero_point: [N, G] int8."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    gated: bool

    @property
    def out_features(self) -> int:
        rows = self.weight.shape[0]
        return rows // 2 if self.gated else rows


class TritonW8A16:
    """`protocols.kernel.LinearKernel` for ``w8a16_linear`` in groups of a multiple of 16 columns, or one a row."""

    fuses = frozenset({"norm", "bias", "silu_mul", "residual"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> Int8Codes:
        zero_point = tensors.get("zero_point")
        return Int8Codes(
            weight=tensors["weight"].contiguous(),
            scale=tensors["scale"].contiguous(),
            zero_point=None if zero_point is None else zero_point.contiguous(),
            bias=tensors.get("bias"),
            gated=act is not None,
        )

    def apply(
        self,
        x: Tensor,
        packed: Int8Codes,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        rows, columns = x.shape
        n, dtype, sms = packed.out_features, out_dtype or x.dtype, gpu(x.device).sms
        if rows > MAX_FEW_ROWS:
            return many_rows(
                x,
                lambda first, count: widen(packed, first, count, x.dtype),
                packed.weight.shape[0],
                packed.bias,
                norm,
                residual,
                dtype,
                gated=packed.gated,
            )
        out = torch.empty((rows, n), dtype=dtype, device=x.device)
        if rows == 1:
            matvec(x, packed, norm, residual, out, matvec_blocks(n, columns, sms, gated=packed.gated))
        elif rows:
            few_rows(x, packed, norm, residual, out, few_rows_blocks(n, columns, sms, gated=packed.gated))
        return out


def matvec_blocks(n: int, k: int, sms: int, *, gated: bool) -> Blocks:
    """For one row: as for dense weights, 16 KB of weights in flight a program."""
    block_k = min(power_of_2(max(k, 64)), 2048 if k % 2048 == 0 else 1024)
    block_n = max(16384 // (block_k * (2 if gated else 1)), 1)
    while block_n > 1 and 2 * ceil_div(n, block_n) < 3 * sms:
        block_n //= 2
    return Blocks(min(block_n, 16), block_k, warps=4, unroll=4)


def matvec(
    x: Tensor, packed: Int8Codes, norm: Norm | None, residual: Tensor | None, out: Tensor, blocks: Blocks
) -> None:
    """Fill out [1, n] for x [1, K]."""
    n, device = out.shape[1], gpu(x.device)
    norm_weight, eps = norm or (None, 0.0)
    w8a16_matvec_kernel[(ceil_div(n, blocks.block_n),)](
        unit_stride(x),
        packed.weight,
        packed.scale,
        packed.zero_point,
        out,
        norm_weight,
        packed.bias,
        None if residual is None else unit_stride(residual),
        eps,
        n,
        K=packed.weight.shape[1],
        GROUPS=packed.scale.shape[1],
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        UNROLL=blocks.unroll,
        GATED=packed.gated,
        NORM=norm is not None,
        ASYMMETRIC=packed.zero_point is not None,
        BIAS=packed.bias is not None,
        RESIDUAL=residual is not None,
        PDL=device.pdl,
        num_warps=blocks.warps,
        launch_pdl=device.pdl,
    )


def few_rows(
    x: Tensor, packed: Int8Codes, norm: Norm | None, residual: Tensor | None, out: Tensor, blocks: Blocks
) -> None:
    """Fill out [M, n] for x [M, K]."""
    (rows, n), device = out.shape, gpu(x.device)
    x = unit_stride(x)
    norm_weight, eps = norm or (None, 0.0)
    block_m = max(power_of_2(rows), 16)
    # x has two bytes a value, and so have the weights once they are widened.
    blocks = fitted(blocks, block_m, x.element_size(), device.shared, gated=packed.gated)
    residual = None if residual is None else unit_stride(residual)
    w8a16_few_rows_kernel[(ceil_div(n, blocks.block_n),)](
        x,
        packed.weight,
        packed.scale,
        packed.zero_point,
        out,
        norm_weight,
        packed.bias,
        residual,
        eps,
        rows,
        n,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        K=packed.weight.shape[1],
        GROUPS=packed.scale.shape[1],
        BLOCK_M=block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        STAGES=blocks.stages,
        GATED=packed.gated,
        NORM=norm is not None,
        ASYMMETRIC=packed.zero_point is not None,
        BIAS=packed.bias is not None,
        RESIDUAL=residual is not None,
        PDL=device.pdl,
        num_warps=blocks.warps,
        launch_pdl=device.pdl,
    )


def widen(packed: Int8Codes, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Rows first to first + rows of the weight, dequantised: [rows, K]."""
    columns = packed.weight.shape[1]
    wide = torch.empty((rows, columns), dtype=dtype, device=packed.weight.device)
    w8a16_dequantize_kernel[(ceil_div(rows, 8), ceil_div(columns, 512))](
        packed.weight,
        packed.scale,
        packed.zero_point,
        wide,
        first,
        first + rows,
        K=columns,
        GROUPS=packed.scale.shape[1],
        BLOCK_N=8,
        BLOCK_K=512,
        ASYMMETRIC=packed.zero_point is not None,
        num_warps=4,
    )
    return wide
