"""The operation ``linear`` in bfloat16 and float16: one launch for few rows, cuBLAS between two for many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2
from pymllm_kernels.triton.linear_kernels import few_rows_kernel, matvec_kernel
from pymllm_kernels.triton.linear_plan import MAX_FEW_ROWS, Blocks, few_rows_blocks, fitted, matvec_blocks
from pymllm_kernels.triton.norm import rms_norm, silu_mul


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """weight: [N, K] without gaps, [gate; up] where gated. bias: [N]."""

    weight: Tensor
    bias: Tensor | None
    gated: bool

    @property
    def out_features(self) -> int:
        rows = self.weight.shape[0]
        return rows // 2 if self.gated else rows


class TritonLinear:
    """`protocols.kernel.LinearKernel` for ``linear``."""

    fuses = frozenset({"norm", "bias", "silu_mul", "residual"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> DenseWeight:
        return DenseWeight(tensors["weight"].contiguous(), tensors.get("bias"), gated=act is not None)

    def apply(
        self,
        x: Tensor,
        packed: DenseWeight,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        rows, columns = x.shape
        n, dtype = packed.out_features, out_dtype or x.dtype
        if rows > MAX_FEW_ROWS:
            return many_rows(x, packed, norm, residual, dtype)
        sms = gpu(x.device).sms
        out = torch.empty((rows, n), dtype=dtype, device=x.device)
        if rows == 1:
            matvec(x, packed, norm, residual, out, matvec_blocks(n, columns, sms, gated=packed.gated))
        elif rows:
            blocks = few_rows_blocks(n, columns, sms, gated=packed.gated)
            few_rows(x, packed, norm, residual, out, blocks)
        return out


def matvec(
    x: Tensor, packed: DenseWeight, norm: Norm | None, residual: Tensor | None, out: Tensor, blocks: Blocks
) -> None:
    """Fill out [1, n] for x [1, K]."""
    n, device = out.shape[1], gpu(x.device)
    norm_weight, eps = norm or (None, 0.0)
    matvec_kernel[(ceil_div(n, blocks.block_n),)](
        unit_stride(x),
        packed.weight,
        out,
        norm_weight,
        packed.bias,
        None if residual is None else unit_stride(residual),
        eps,
        n,
        K=x.shape[1],
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        STAGES=blocks.stages,
        UNROLL=blocks.unroll,
        GATED=packed.gated,
        NORM=norm is not None,
        BIAS=packed.bias is not None,
        RESIDUAL=residual is not None,
        PDL=device.pdl,
        num_warps=blocks.warps,
        launch_pdl=device.pdl,
    )


def few_rows(
    x: Tensor, packed: DenseWeight, norm: Norm | None, residual: Tensor | None, out: Tensor, blocks: Blocks
) -> None:
    """Fill out [M, n] for x [M, K]."""
    (rows, n), device = out.shape, gpu(x.device)
    x = unit_stride(x)
    norm_weight, eps = norm or (None, 0.0)
    block_m = max(power_of_2(rows), 16)
    blocks = fitted(blocks, block_m, x.element_size(), device.shared, gated=packed.gated)
    residual = None if residual is None else unit_stride(residual)
    few_rows_kernel[(ceil_div(n, blocks.block_n),)](
        x,
        packed.weight,
        out,
        norm_weight,
        packed.bias,
        residual,
        eps,
        rows,
        n,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        K=x.shape[1],
        BLOCK_M=block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        STAGES=blocks.stages,
        GATED=packed.gated,
        NORM=norm is not None,
        BIAS=packed.bias is not None,
        RESIDUAL=residual is not None,
        PDL=device.pdl,
        num_warps=blocks.warps,
        launch_pdl=device.pdl,
    )


def many_rows(
    x: Tensor, packed: DenseWeight, norm: Norm | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Norm, cuBLAS's product, activation: as many launches, for products bound by arithmetic."""
    if norm is not None:
        x = rms_norm(unit_stride(x), *norm)
    if residual is not None and packed.bias is None and not packed.gated and dtype == x.dtype:
        # In the residual's own memory, which the contract allows: no copy of it comes first.
        return residual.addmm_(x, packed.weight.t())
    if dtype == torch.float32 != x.dtype and x.is_cuda and packed.bias is None and not packed.gated:
        # As it is summed: not rounded to 16 bits and widened again, which takes longer than a product of few rows.
        y = torch.mm(x, packed.weight.t(), out_dtype=dtype)
    else:
        y = F.linear(x, packed.weight, packed.bias)
    y = silu_mul(y, dtype) if packed.gated else y.to(dtype)
    return y if residual is None else y + residual


def unit_stride(x: Tensor) -> Tensor:
    """x [M, K] with its columns side by side; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()
