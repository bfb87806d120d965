"""The operation ``w4a16_linear``: one launch for few rows; for many the weights are widened for cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.linear_plan import MAX_FEW_ROWS, Blocks
from pymllm_kernels.triton.w4a16_kernels import (
    w4a16_dequantize_kernel,
    w4a16_few_rows_kernel,
    w4a16_matvec_kernel,
)
from pymllm_kernels.triton.widened import many_rows

PACKED = 1 << 24
"""Codes that are repacked at a time, for which int32 intermediates are made."""


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """words: [N, K / 8] int32 as in `w4a16_kernels`; rows are [gate; up] where gated. scale: [N, G].

    zero_point: [N, G] int8. columns: K.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    columns: int
    gated: bool

    @property
    def out_features(self) -> int:
        rows = self.words.shape[0]
        return rows // 2 if self.gated else rows

    @property
    def group_units(self) -> int:
        """Units of 32 columns that share a scale."""
        return self.columns // 32 // self.scale.shape[1]


def to_words(packed: Tensor) -> Tensor:
    """[N, K / 2] uint8 as in `quant_ops.unpack_int4` to [N, K / 8] int32 as the kernels read them."""
    rows, width = packed.shape
    words = torch.empty((rows, width // 4), dtype=torch.int32, device=packed.device)
    step = max(PACKED // (width * 2), 1)
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)[:, None]
    for start in range(0, rows, step):
        block = packed[start : start + step]
        codes = torch.stack((block & 15, block >> 4), dim=-1).view(len(block), -1, 8, 4).to(torch.int32)
        # Nibbles do not overlap, so their sum, which may wrap into the sign, is their union.
        words[start : start + step] = (codes << shifts).sum(2, dtype=torch.int32).view(len(block), -1)
    return words


class TritonW4A16:
    """`protocols.kernel.LinearKernel` for ``w4a16_linear`` in groups of a multiple of 32 columns."""

    fuses = frozenset({"norm", "bias", "silu_mul", "residual"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> Int4Weight:
        zero_point = tensors.get("zero_point")
        return Int4Weight(
            words=to_words(tensors["weight"]),
            scale=tensors["scale"].contiguous(),
            zero_point=None if zero_point is None else zero_point.contiguous(),
            bias=tensors.get("bias"),
            columns=tensors["weight"].shape[1] * 2,
            gated=act is not None,
        )

    def apply(
        self,
        x: Tensor,
        packed: Int4Weight,
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
                packed.words.shape[0],
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
    """For one row; block_k counts columns. A warp's 16-byte loads cover 1024 columns of one row."""
    block_k = 1024 if k >= 1024 else power_of_2(max(k, 128))
    block_n = 8 if gated else 16
    while block_n > 2 and 2 * ceil_div(n, block_n) < 3 * sms:
        block_n //= 2
    return Blocks(block_n, block_k, warps=4 if block_n * (2 if gated else 1) >= 8 else 2, unroll=2)


def few_rows_blocks(n: int, k: int, sms: int, *, gated: bool) -> Blocks:
    """For 2 to MAX_FEW_ROWS rows; a step covers block_k columns, 8 products of block_k / 8."""
    small = n <= 16 * sms
    block_n = 16 if small else 32 if gated else 64
    return Blocks(block_n, min(256, power_of_2(max(k, 128))), warps=2 if small else 4, stages=4)


def matvec(
    x: Tensor, packed: Int4Weight, norm: Norm | None, residual: Tensor | None, out: Tensor, blocks: Blocks
) -> None:
    """Fill out [1, n] for x [1, K]."""
    n, device = out.shape[1], gpu(x.device)
    norm_weight, eps = norm or (None, 0.0)
    w4a16_matvec_kernel[(ceil_div(n, blocks.block_n),)](
        unit_stride(x),
        packed.words,
        packed.scale,
        packed.zero_point,
        out,
        norm_weight,
        packed.bias,
        None if residual is None else unit_stride(residual),
        eps,
        n,
        K=packed.columns,
        GROUP_UNITS=packed.group_units,
        BLOCK_N=blocks.block_n,
        BLOCK_W=blocks.block_k // 8,
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
    x: Tensor, packed: Int4Weight, norm: Norm | None, residual: Tensor | None, out: Tensor, blocks: Blocks
) -> None:
    """Fill out [M, n] for x [M, K]."""
    (rows, n), device = out.shape, gpu(x.device)
    x = unit_stride(x)
    norm_weight, eps = norm or (None, 0.0)
    residual = None if residual is None else unit_stride(residual)
    w4a16_few_rows_kernel[(ceil_div(n, blocks.block_n),)](
        x,
        packed.words,
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
        K=packed.columns,
        GROUP_UNITS=packed.group_units,
        BLOCK_M=max(power_of_2(rows), 16),
        BLOCK_N=blocks.block_n,
        BLOCK_W=blocks.block_k // 8,
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


def widen(packed: Int4Weight, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Rows first to first + rows of the weight, dequantised: [rows, K]."""
    columns = packed.columns
    wide = torch.empty((rows, columns), dtype=dtype, device=packed.words.device)
    w4a16_dequantize_kernel[(ceil_div(rows, 8), ceil_div(columns, 1024))](
        packed.words,
        packed.scale,
        packed.zero_point,
        wide,
        first,
        first + rows,
        K=columns,
        GROUP_UNITS=packed.group_units,
        BLOCK_N=8,
        BLOCK_W=128,
        ASYMMETRIC=packed.zero_point is not None,
        num_warps=4,
    )
    return wide
