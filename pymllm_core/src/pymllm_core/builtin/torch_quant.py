"""The quantised linears by their definitions (`nn.quant_ops`): every device, dtype and shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.nn.quant_ops import (
    dequantize,
    int8_matmul,
    quantize_activation,
    unpack_int4,
    w8a8_epilogue,
)
from pymllm_core.protocols.kernel import Norm

BLOCK = 1 << 23
"""Weights that are dequantised at a time, so that a head of 150,000 rows takes no gigabyte for it."""


class TorchW8A16:
    """``w8a16_linear``: dequantise, then `F.linear`."""

    fuses = frozenset({"bias"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> dict[str, Tensor]:
        return dict(tensors)

    def codes(self, weight: Tensor, columns: int) -> Tensor:
        """Rows of ``weight`` as [N, columns] int8."""
        return weight

    def apply(
        self,
        x: Tensor,
        packed: dict[str, Tensor],
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        weight, columns = packed["weight"], x.shape[1]
        scale, zero_point, bias = packed["scale"], packed.get("zero_point"), packed.get("bias")
        step = max(BLOCK // columns, 1)
        blocks = []
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            wide = dequantize(
                self.codes(weight[rows], columns),
                scale[rows],
                None if zero_point is None else zero_point[rows],
                packed.get("g_idx"),
            )
            blocks.append(F.linear(x, wide, None if bias is None else bias[rows]))
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
        return y if out_dtype is None else y.to(out_dtype)


class TorchW4A16(TorchW8A16):
    """``w4a16_linear``: unpack, dequantise, then `F.linear`."""

    def codes(self, weight: Tensor, columns: int) -> Tensor:
        return unpack_int4(weight, columns)


class TorchW8A8:
    """``w8a8_linear``: quantise the activations, multiply the integers exactly, scale in float32."""

    fuses = frozenset({"bias"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> dict[str, Tensor]:
        return dict(tensors)

    def apply(
        self,
        x: Tensor,
        packed: dict[str, Tensor],
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        weight_sum = packed.get("weight_sum")
        codes, scale, zero_point = quantize_activation(
            x,
            asymmetric=weight_sum is not None,
            scale=packed.get("input_scale"),
            zero_point=packed.get("input_zero_point"),
        )
        product = int8_matmul(codes, packed["weight"])
        y = w8a8_epilogue(product, scale, zero_point, packed["weight_scale"], weight_sum, packed.get("bias"))
        return y.to(out_dtype or x.dtype)
