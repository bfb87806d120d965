"""Activations to 8-bit integers, by the definitions of `nn.quant_ops`, with the norm before them.

The codes of a row do not change when the row is scaled, so the norm's factor 1 / rms only enters the scale,
and the row is read without waiting for it. The normalised row is not rounded before it is quantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.triton.launch import gpu, power_of_2

WHOLE = tl.constexpr(8388608.0)
"""2²³: from there on every float32 is a whole number, and the sum with it rounds what is smaller."""


@triton.jit
def round_even(x):
    """The nearest whole number, of two the even one (IEEE 754 roundToIntegralTiesToEven)."""
    size = tl.abs(x)
    size = tl.where(size < WHOLE, (size + WHOLE) - WHOLE, size)
    return tl.where(x < 0, -size, size)


@triton.jit
def row_quantisation(
    absmax, low, high, rms_inverse, input_scale, input_zero, STATIC: tl.constexpr, ASYMMETRIC: tl.constexpr
):
    """Divisor of the values as they were read, scale of the result and zero point (a float32).

    absmax, low, high: of the row as read. rms_inverse: the norm's factor, 1 without a norm.
    """
    if STATIC:
        scale = tl.load(input_scale).to(tl.float32)
        zero = tl.load(input_zero).to(tl.float32) if ASYMMETRIC else 0.0
        return scale / rms_inverse, scale, zero
    elif ASYMMETRIC:
        flat = high <= low
        step = tl.where(flat, tl.div_rn(tl.abs(high), 127.0), tl.div_rn(high - low, 255.0))
        divisor = tl.where(step > 0, step, 1.0)
        zero = tl.where(flat, 0.0, round_even(-128.0 - tl.div_rn(low, divisor)))
        return divisor, step * rms_inverse, zero
    else:
        # torch divides a number by a tensor in these two steps, and ties are decided by the last bit.
        factor = tl.div_rn(1.0, tl.where(absmax > 0, absmax, 1.0)) * 127.0
        return factor, tl.div_rn(absmax, 127.0) * rms_inverse, 0.0


@triton.jit
def codes_of(x, divisor, zero, STATIC: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """Whole numbers in -128..127, as float32. divisor is the factor where both flags are false."""
    scaled = tl.div_rn(x, tl.zeros_like(x) + divisor) if STATIC or ASYMMETRIC else x * divisor
    x = round_even(scaled) + zero
    return tl.minimum(tl.maximum(x, -128.0), 127.0)


@triton.jit
def quantize_rows_kernel(
    x,
    norm_weight,
    codes,
    scales,
    zeros,
    eps,
    input_scale,
    input_zero,
    x_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    STATIC: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program. codes: [M, K] int8; scales: [M] float32; zeros: [M] float32 or int32."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    values = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    rms_inverse = 1.0
    if NORM:
        rms_inverse = tl.rsqrt(tl.sum(values * values, axis=0) / K + eps)
        values *= tl.load(norm_weight + cols, mask=mask, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(values), axis=0)
    low = tl.min(tl.where(mask, values, float("inf")), axis=0)
    high = tl.max(tl.where(mask, values, float("-inf")), axis=0)
    divisor, scale, zero = row_quantisation(
        absmax, low, high, rms_inverse, input_scale, input_zero, STATIC, ASYMMETRIC
    )
    quantised = codes_of(values, divisor, zero, STATIC, ASYMMETRIC)
    tl.store(codes + row * K + cols, quantised.to(tl.int8), mask=mask)
    tl.store(scales + row, scale)
    if ASYMMETRIC:
        tl.store(zeros + row, zero)


@dataclass(frozen=True, slots=True)
class StaticInput:
    """Scale (float32) and zero point (int32) of static activations, tensors without dimensions."""

    scale: Tensor | None
    zero_point: Tensor | None


def quantize_rows(
    x: Tensor,
    norm: Norm | None,
    static: StaticInput,
    *,
    asymmetric: bool,
    zero_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """norm(x) [M, K] as codes [M, K] int8, scales [M] float32 and, where asymmetric, zero points [M].

    zero_dtype: of the zero points, which are whole numbers; float32 or int32.
    """
    (rows, columns), device = x.shape, x.device
    codes = torch.empty((rows, columns), dtype=torch.int8, device=device)
    scales = torch.empty(rows, dtype=torch.float32, device=device)
    zeros = torch.empty(rows, dtype=zero_dtype, device=device) if asymmetric else None
    norm_weight, eps = norm or (None, 0.0)
    block = power_of_2(columns)
    pdl = gpu(device).pdl
    quantize_rows_kernel[(rows,)](
        x,
        norm_weight,
        codes,
        scales,
        zeros,
        eps,
        static.scale,
        static.zero_point,
        x.stride(0),
        K=columns,
        BLOCK=block,
        NORM=norm is not None,
        STATIC=static.scale is not None,
        ASYMMETRIC=asymmetric,
        PDL=pdl,
        num_warps=min(max(block // 512, 1), 16),
        launch_pdl=pdl,
    )
    return codes, scales, zeros
