"""Definitions of the quantised operations in plain torch: what every kernel for them must compute.

A dequantised weight is ``(q - zero_point) * scale`` in the scale's dtype, which is the computation's: the
difference of two 8-bit codes is exact even in bfloat16, so there is one rounding. Integer products are
exact, and the float32 epilogue follows them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """[N, B] uint8, two codes a byte, the low half first, offset by 8, to [N, columns] int8 in -8..7."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :columns]
    return codes.to(torch.int8) - 8


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, g_idx: Tensor | None = None
) -> Tensor:
    """[N, K] int8 codes to [N, K] in scale's dtype.

    scale: [N, G]; group g serves columns g K/G to (g+1) K/G, or those where g_idx [K] is g.
    zero_point: [N, G] int8.
    """
    rows, columns = codes.shape
    dtype = scale.dtype
    if g_idx is not None:
        index = g_idx.long()
        wide = codes.to(dtype)
        if zero_point is not None:
            wide -= zero_point.to(dtype)[:, index]
        return wide.mul_(scale[:, index])
    groups = scale.shape[1]
    grouped = codes.to(dtype).view(rows, groups, columns // groups)
    if zero_point is not None:
        grouped -= zero_point.to(dtype)[:, :, None]
    return grouped.mul_(scale[:, :, None]).view(rows, columns)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] int8 times b.T, b [N, K] int8: [M, N] int32, exact."""
    # torch 2.13's _int_mm takes a transposed matrix of one row for a plain one, and gives zeros.
    if a.device.type == "cpu" and a.shape[1] > 1:
        return torch._int_mm(a, b.t())
    return float_pieces(a, b)


def float_pieces(a: Tensor, b: Tensor) -> Tensor:
    """`int8_matmul` where there is no product of integers."""
    # Integers below 2^24 are exact in float32, and so are sums of 1024 products of 8-bit numbers.
    total = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], 1024):
        piece = slice(start, start + 1024)
        total += (a[:, piece].float() @ b[:, piece].float().t()).to(torch.int32)
    return total


def quantize_per_token_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] to codes [M, K] int8 and scales [M, 1] float32: absmax / 127, round half to even.

    A row of zeros has scale 0. As vLLM's dynamic_scaled_int8_quant.
    """
    wide = x.float()
    absmax = wide.abs().amax(-1, keepdim=True)
    inverse = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    codes = (wide * inverse).round_().clamp_(-128, 127)
    return codes.to(torch.int8), absmax / 127.0


def quantize_per_token_int8_asym(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] to codes [M, K] int8, scales [M, 1] float32 and zero points [M, 1] int32.

    scale = (max - min) / 255, zero point = round(-128 - min / scale). The range is not extended to 0, so a
    zero point may lie outside of int8. A row of one value, which has no range, is quantised symmetrically.
    """
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    flat = high <= low
    scale = torch.where(flat, high.abs() / 127.0, (high - low) / 255.0)
    divisor = torch.where(scale > 0, scale, 1.0)
    zero_point = torch.where(flat, 0.0, (-128.0 - low / divisor).round())
    codes = ((wide / divisor).round_() + zero_point).clamp_(-128, 127)
    return codes.to(torch.int8), scale, zero_point.to(torch.int32)


def quantize_static_int8(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """x [M, K] to codes [M, K] int8 with one scale and one zero point for the whole tensor."""
    codes = (x.float() / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(-128, 127).to(torch.int8)


def quantize_activation(
    x: Tensor, *, asymmetric: bool, scale: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point of x as ``w8a8_linear`` wants them; scale None: found for each row."""
    if scale is not None:
        return quantize_static_int8(x, scale, zero_point), scale, zero_point
    if asymmetric:
        return quantize_per_token_int8_asym(x)
    return (*quantize_per_token_int8(x), None)


def w8a8_epilogue(
    product: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """product [M, N], the exact integer product, to scale · weight_scale · (product - zero_point · weight_sum) + bias.

    scale, zero_point: [M, 1] or one number; weight_scale [N] float32, weight_sum [N] int32. Float32.
    """
    if zero_point is not None:
        assert weight_sum is not None
        # The correction of a row far from zero does not fit int32.
        product = product.long() - zero_point.long() * weight_sum.long()
    y = product.float() * scale * weight_scale
    return y if bias is None else y + bias.float()
