"""The operation ``w8a8_linear`` with CUTLASS's product for many rows; Triton's kernels do the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.cutlass.gemm import Int8Gemm, Int8GemmError
from pymllm_kernels.cutlass.library import load_gemms
from pymllm_kernels.cutlass.tiles import Capability, Tile, choose_tile
from pymllm_kernels.triton.launch import gpu
from pymllm_kernels.triton.linear import unit_stride
from pymllm_kernels.triton.norm import silu_mul
from pymllm_kernels.triton.quantize import quantize_rows
from pymllm_kernels.triton.w8a8 import Int8Weight, TritonW8A8

FEW_ROWS = 16
"""Up to here the product is bound by reading the weights, and Triton's kernels do all in one or two launches."""


def try_each(gemms: Iterable[Int8Gemm], device: torch.device) -> None:
    """Launch every product once, because CUDA loads a kernel at its first launch: not while a graph is captured.

    Raises Int8GemmError, e.g. where the driver is too old for the library, or where a product is wrong.
    """
    codes = torch.ones((16, 16), dtype=torch.int8, device=device)
    ones = torch.ones(16, dtype=torch.float32, device=device)
    for gemm in gemms:
        out = gemm(codes, codes, ones, ones)
        if not torch.equal(out, torch.full_like(out, 16)):
            raise Int8GemmError(f"an int8 product of ones is wrong on {device}: {out.flatten()[:4].tolist()}")


class CutlassW8A8(TritonW8A8):
    """`protocols.kernel.LinearKernel` for ``w8a8_linear`` in one dtype.

    More than FEW_ROWS rows take three launches at most: norm and quantisation; the product with scales,
    correction, bias and residual; SiLU·mul, whose two factors are rounded to the dtype before it. Results of
    another dtype than the computation's are Triton's.
    """

    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def __init__(self) -> None:
        self.gemms: dict[Tile, Int8Gemm] = {}
        self.capability: Capability = (0, 0)

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> Int8Weight:
        """As `TritonW8A8.pack`; the first one compiles what is missing.

        Raises KernelBuildError where that fails, Int8GemmError where a product cannot run here.
        """
        device = tensors["weight"].device
        if not self.gemms:
            self.capability = torch.cuda.get_device_capability(device)
            gemms = load_gemms(self.dtype, self.capability)
            try_each(gemms.values(), device)
            self.gemms = gemms
        if "bias" in tensors:
            tensors = {**tensors, "bias": tensors["bias"].float()}
        return super().pack(tensors, act=act)

    def apply(
        self,
        x: Tensor,
        packed: Int8Weight,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        rows = x.shape[0]
        if rows <= FEW_ROWS or (out_dtype or x.dtype) != self.dtype:
            return super().apply(x, packed, norm=norm, residual=residual, out_dtype=out_dtype)
        codes, scales, zeros = quantize_rows(
            unit_stride(x),
            norm,
            packed.static,
            asymmetric=packed.sum is not None,
            zero_dtype=torch.int32,
        )
        tile = choose_tile(rows, packed.weight.shape[0], gpu(x.device).sms, self.capability)
        y = self.gemms[tile](
            codes,
            packed.weight,
            scales,
            packed.scale,
            zero_point=zeros,
            b_sum=packed.sum,
            bias=packed.bias,
            residual=None if residual is None or packed.gated else residual.contiguous(),
        )
        if packed.gated:
            y = silu_mul(y, self.dtype)
            if residual is not None:
                y += residual
        return y


class CutlassW8A8Half(CutlassW8A8):
    """The same in float16: libraries are compiled for one type of result."""

    dtype = torch.float16
