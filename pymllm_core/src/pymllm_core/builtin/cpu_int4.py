"""4-bit weights by torch's `_weight_int4pack_mm_for_cpu`, and by dequantising its layout for many rows."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pymllm_core.builtin.scratch import BLOCK, take
from pymllm_core.protocols.kernel import Norm

GROUP_SIZES = (32, 64, 128, 256)
"""What the operator accepts."""


class Int4Pack(NamedTuple):
    """weight: the operator's layout, [N, K / 2] uint8. affine: [G, N, 2], scale and offset."""

    weight: Tensor
    group_size: int
    affine: Tensor


class Int4PackLinear:
    """``w4a16_linear`` in bfloat16 or float16.

    The operator computes (u - 8) · scale + offset, u = q + 8. A zero point becomes the offset -zp · scale,
    rounded to the dtype, which differs from the definition by up to 2^-8 of it.
    """

    fuses: frozenset[str] = frozenset()

    MANY_ROWS = 96
    """From so many rows on, dequantising and multiplying in bfloat16 is faster: 256 rows times 4096 x 4096 take
    34 instead of 55 ms (one thread, AVX512-BF16)."""

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> Int4Pack:
        packed, scale = tensors["weight"], tensors["scale"]
        columns, groups = packed.shape[1] * 2, scale.shape[1]
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int32)
        group_size = columns // groups
        if group_size not in GROUP_SIZES:  # one group a row: repeated for groups that the operator knows
            group_size = max(size for size in GROUP_SIZES if columns % size == 0)
        zero_point = tensors.get("zero_point")
        offset = torch.zeros_like(scale) if zero_point is None else -(zero_point.to(scale.dtype) * scale)
        affine = torch.stack((scale, offset), dim=-1)
        affine = affine.repeat_interleave(columns // group_size // groups, dim=1)
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return Int4Pack(weight, group_size, affine.transpose(0, 1).contiguous())

    def apply(
        self,
        x: Tensor,
        packed: Int4Pack,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if x.shape[0] >= self.MANY_ROWS and x.dtype == torch.bfloat16 and layout_width():
            y = _multiply_dequantised(x, packed)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), packed.weight, packed.group_size, packed.affine
            )
        return y if out_dtype is None else y.to(out_dtype)


@functools.cache
def layout_width() -> int:
    """How many rows the operator's layout interleaves on this CPU; 0 where it is none that is known here.

    The layout is private to torch (aten/src/ATen/native/cpu/int4mm_kernel.cpp) and depends on the vector
    width, so it is asked for: a matrix is packed, and unpacked on trial.
    """
    codes = torch.randint(0, 16, (128, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for width in (64, 32):
        found = torch.empty(32, 128)
        _unpack(packed.view(-1), width, found)
        if torch.equal(found.t().int(), codes - 8):
            return width
    return 0


def _unpack(data: Tensor, width: int, out: Tensor) -> None:
    """Whole blocks of `width` rows to out [K, rows], codes - 8.

    A block holds, for each column, width / 2 bytes: rows 0 .. width/2 low, rows width/2 .. width high.
    """
    columns, rows = out.shape
    half = width // 2
    blocks = data.view(rows // width, columns, half).transpose(0, 1)
    halves = out.view(columns, rows // width, 2, half)
    halves[:, :, 0].copy_(blocks & 15)
    halves[:, :, 1].copy_(blocks >> 4)
    out.sub_(8)


def _multiply_dequantised(x: Tensor, packed: Int4Pack) -> Tensor:
    """x [M, K] times the dequantised weights; the rows behind the last whole block by the operator."""
    width, group_size, affine = layout_width(), packed.group_size, packed.affine
    rows, columns = packed.weight.shape[0], x.shape[1]
    whole = rows // width * width
    data = packed.weight.view(-1)
    y = x.new_empty((x.shape[0], rows))
    step = max(BLOCK // columns // width, 1) * width
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        wide = take(columns, stop - start, x.dtype)
        _unpack(data[start * columns // 2 : stop * columns // 2], width, wide)
        grouped = wide.view(columns // group_size, group_size, stop - start)
        # Contiguous copies: with a stride between them, torch multiplies one number at a time.
        scale, offset = affine[:, start:stop].permute(2, 0, 1).contiguous().unsqueeze(2)
        torch.addcmul(offset, grouped, scale, out=grouped)
        y[:, start:stop] = x @ wide
    if whole < rows:
        y[:, whole:] = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), packed.weight[whole:], group_size, affine[:, whole:].contiguous()
        )
    return y
