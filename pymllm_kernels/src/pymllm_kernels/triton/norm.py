"""Row-wise kernels beside the products: RMSNorm and SiLU·mul, one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2


@triton.jit
def rms_norm_kernel(x, weight, out, x_stride, eps, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    wide = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / K + eps)
    dtype = out.dtype.element_ty
    # Rounded before the weight multiplies it, as `nn.ops.rms_norm` defines.
    normed = (wide * scale).to(dtype).to(tl.float32)
    gain = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * K + cols, (normed * gain).to(dtype), mask=mask)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_mul_kernel(x, out, x_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < COLUMNS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + COLUMNS + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * COLUMNS + cols, (silu(gate) * up).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`nn.ops.rms_norm` of x [M, K], whose rows may lie apart. Returns [M, K] without gaps."""
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    block = power_of_2(columns)
    warps = min(max(block // 512, 1), 16)
    pdl = gpu(x.device).pdl
    rms_norm_kernel[(rows,)](
        x, weight, out, x.stride(0), eps, columns, block, PDL=pdl, num_warps=warps, launch_pdl=pdl
    )
    return out


def silu_mul(x: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) · up of x = [gate, up], [M, 2 I]. Returns [M, I] in `dtype`."""
    rows, columns = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, columns), dtype=dtype, device=x.device)
    block = min(power_of_2(columns), 2048)
    pdl = gpu(x.device).pdl
    silu_mul_kernel[(rows, ceil_div(columns, block))](
        x, out, x.stride(0), columns, block, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out
