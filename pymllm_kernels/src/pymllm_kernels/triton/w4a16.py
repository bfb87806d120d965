"""The operation ``w4a16_linear``: one launch for few rows; for many the weights are widened for cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.linear_plan import Blocks
from pymllm_kernels.triton.norm import rms_norm
from pymllm_kernels.triton.w4a16_kernels import w4a16_dequantize_kernel, w4a16_few_rows_kernel
from pymllm_kernels.triton.widened import many_rows

MAX_FEW_ROWS = 64
"""Up to so many rows the weights are widened in registers, again for each launch; over it once, for cuBLAS."""

MAX_BLOCK_M = 32
"""Rows of x a program; further rows are further programs, which read the weights again, from a cache."""

PACKED = 1 << 24
"""Codes that are repacked at a time, for which intermediates of 16 bits are made."""

UNIT = 128
"""Columns whose codes are interleaved: see `w4a16_kernels`."""

MARGIN = 128
"""Scales after the last row's, which blocks that reach over the end may read."""


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """words: [N, 32 U] int16 for U units as in `w4a16_kernels`; rows are [gate; up] where gated.

    constants: [G, N + MARGIN] int32 and a little more, the scales and zero points. columns: K.
    """

    words: Tensor
    constants: Tensor
    bias: Tensor | None
    columns: int
    asymmetric: bool
    gated: bool

    @property
    def out_features(self) -> int:
        rows = self.words.shape[0]
        return rows // 2 if self.gated else rows

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.constants.shape[0]


def to_words(packed: Tensor) -> Tensor:
    """[N, K / 2] uint8 as in `quant_ops.unpack_int4` to [N, 32 U] int16 as the kernels read them."""
    rows, width = packed.shape
    units = ceil_div(width * 2, UNIT)
    words = torch.empty((rows, units * 32), dtype=torch.int16, device=packed.device)
    step = max(PACKED // (units * UNIT), 1)
    for start in range(0, rows, step):
        block = torch.nn.functional.pad(packed[start : start + step], (0, units * 64 - width))
        codes = torch.stack((block & 15, block >> 4), dim=-1).view(len(block), units, 4, 32).to(torch.int16)
        # Nibbles do not overlap, so their sum, which may wrap into the sign, is their union.
        word = codes[:, :, 0] + (codes[:, :, 1] << 4) + (codes[:, :, 2] << 8) + (codes[:, :, 3] << 12)
        words[start : start + step] = word.view(len(block), -1)
    return words


def to_constants(scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """scale, zero_point: [N, G] to [G, N + MARGIN] int32 and a little more, as the kernels read them.

    Exact in both dtypes for zero points of -8 to 7: bfloat16 has 8 bits for 128 to 143, float16 11.
    """
    rows, groups = scale.shape
    offset = torch.full_like(scale, -136 if scale.dtype == torch.bfloat16 else -1032)
    if zero_point is not None:
        offset -= zero_point.to(scale.dtype)
    # The first of two halves is the lower one: GPUs and the CPUs beside them are little-endian.
    words = torch.stack((scale, offset), dim=-1).view(torch.int32).squeeze(-1)
    constants = words.new_zeros((groups, ceil_div(rows, 16) * 16 + MARGIN))
    constants[:, :rows] = words.t()
    return constants


class TritonW4A16:
    """`protocols.kernel.LinearKernel` for ``w4a16_linear`` in groups of a multiple of 32 columns."""

    fuses = frozenset({"norm", "bias", "silu_mul", "residual"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> Int4Weight:
        zero_point = tensors.get("zero_point")
        return Int4Weight(
            words=to_words(tensors["weight"]),
            constants=to_constants(tensors["scale"], zero_point),
            bias=tensors.get("bias"),
            columns=tensors["weight"].shape[1] * 2,
            asymmetric=zero_point is not None,
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
        n, dtype = packed.out_features, out_dtype or x.dtype
        if rows > MAX_FEW_ROWS:
            return many_rows(
                x,
                lambda first, wide: widen(packed, first, wide),
                packed.words.shape[0],
                packed.bias,
                norm,
                residual,
                dtype,
                gated=packed.gated,
            )
        out = torch.empty((rows, n), dtype=dtype, device=x.device)
        if rows:
            blocks = few_rows_blocks(rows, n, columns, gpu(x.device).sms, gated=packed.gated)
            few_rows(x, packed, norm, residual, out, blocks)
        return out


def few_rows_blocks(rows: int, n: int, k: int, sms: int, *, gated: bool) -> Blocks:
    """block_k counts columns: a unit a warp. What widens the weights is all warps, so there are 4 or 8 for each
    multiprocessor, however small N is.
    """
    block_n = 16 if gated or n < 24 * sms else 32
    # More results a program read x less often, which beyond one row is as much as the weights; over 16 rows
    # the registers do not hold them.
    if 1 < rows <= 16 and n >= (32 if gated else 64) * sms:
        block_n *= 2
    warps = 8 if ceil_div(n, block_n) <= sms and k >= 2048 else 4
    warps = min(warps, power_of_2(ceil_div(k, UNIT)))
    return Blocks(block_n, warps * UNIT, warps=warps, stages=4)


def fitted(blocks: Blocks, block_m: int, itemsize: int, shared: int, *, gated: bool, norm: bool) -> Blocks:
    """The blocks with as many stages as `shared` bytes hold, and columns that leave room for three.

    The compiler keeps a buffer less than there are stages.
    """
    matrices = 2 if gated else 1
    # 4 KB are left for what else the compiler keeps there. A unit: codes, constants, x and the norm's weight.
    room = shared - (4 << 10)
    unit = blocks.block_n * matrices * (64 + 4 * 4) + UNIT * itemsize * block_m * (2 if norm else 1)
    units = blocks.block_k // UNIT
    while units > 1 and 2 * unit * units > room:
        units //= 2
    # No warp without a unit.
    stages = max(min(blocks.stages, room // (unit * units) + 1), 1)
    return Blocks(blocks.block_n, units * UNIT, min(blocks.warps, units), stages)


def few_rows(
    x: Tensor, packed: Int4Weight, norm: Norm | None, residual: Tensor | None, out: Tensor, blocks: Blocks
) -> None:
    """Fill out [M, n] for x [M, K]."""
    (rows, n), device = out.shape, gpu(x.device)
    x = unit_stride(x)
    if norm is not None and rows > 1:
        # Every program would make the sums of squares of all rows: more than its share of the product.
        x, norm = rms_norm(x, *norm), None
    norm_weight, eps = norm or (None, 0.0)
    residual = None if residual is None else unit_stride(residual)
    # From the tensor cores' least tile to what the registers hold.
    block_m = min(max(power_of_2(rows), 8), MAX_BLOCK_M)
    blocks = fitted(
        blocks, block_m, x.element_size(), device.shared, gated=packed.gated, norm=norm is not None
    )
    w4a16_few_rows_kernel[(ceil_div(n, blocks.block_n), ceil_div(rows, block_m))](
        x,
        packed.words,
        packed.constants,
        out,
        norm_weight,
        packed.bias,
        residual,
        eps,
        rows,
        n,
        packed.constants.stride(0),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        K=packed.columns,
        GROUP=packed.group,
        BLOCK_M=block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_U=blocks.block_k // UNIT,
        STAGES=blocks.stages,
        GATED=packed.gated,
        NORM=norm is not None,
        ASYMMETRIC=packed.asymmetric,
        BIAS=packed.bias is not None,
        RESIDUAL=residual is not None,
        PDL=device.pdl,
        ASM=x.device.type != "cpu",  # which Triton's interpreter runs on, and it knows no PTX
        num_warps=blocks.warps,
        launch_pdl=device.pdl,
    )


def widen(packed: Int4Weight, first: int, wide: Tensor) -> None:
    """Fill wide [rows, K] with the dequantised rows of the weight from `first` on."""
    rows, columns = wide.shape
    w4a16_dequantize_kernel[(ceil_div(rows, 8), ceil_div(columns, 8 * UNIT))](
        packed.words,
        packed.constants,
        wide,
        first,
        first + rows,
        packed.constants.stride(0),
        K=columns,
        GROUP=packed.group,
        BLOCK_N=8,
        BLOCK_U=8,
        ASYMMETRIC=packed.asymmetric,
        ASM=wide.device.type != "cpu",
        num_warps=4,
    )
