"""8-bit linears by torch's own CPU operators: int8pack for weights alone, oneDNN's product for both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.builtin.scratch import BLOCK, take
from pymllm_core.nn.quant_ops import quantize_activation, w8a8_epilogue
from pymllm_core.protocols.kernel import Norm


class Int8PackLinear:
    """``w8a16_linear`` with one scale a row: `_weight_int8pack_mm` for few rows, else cast and multiply."""

    fuses: frozenset[str] = frozenset()

    FEW_ROWS = 16
    """Up to so many rows int8pack is faster: 1 row times 4096 x 4096 takes 1.1 instead of 3.2 ms (one thread)."""

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> tuple[Tensor, Tensor]:
        return tensors["weight"].contiguous(), tensors["scale"].reshape(-1).contiguous()

    def apply(
        self,
        x: Tensor,
        packed: tuple[Tensor, Tensor],
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        weight, scale = packed
        if x.shape[0] <= self.FEW_ROWS:
            y = torch._weight_int8pack_mm(x.contiguous(), weight, scale)
        else:
            rows, columns = weight.shape
            y = x.new_empty((x.shape[0], rows))
            step = max(BLOCK // columns, 1)
            for start in range(0, rows, step):
                piece = weight[start : start + step]
                wide = take(piece.shape[0], columns, x.dtype).copy_(piece)
                torch.mul(F.linear(x, wide), scale[start : start + step], out=y[:, start : start + step])
        return y if out_dtype is None else y.to(out_dtype)


class OneDnnInt8Linear:
    """``w8a8_linear`` through oneDNN with weights packed once.

    Codes are given as uint8, offset by 128: int8 ones would take a slow reference path. With scales of one
    the result is the integer product, summed in int32 and rounded to float32 once, as the epilogue does.
    """

    fuses = frozenset({"bias"})

    def __init__(self) -> None:
        self._ones: dict[int, tuple[Tensor, Tensor]] = {}

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> dict[str, Any]:
        packed: dict[str, Any] = dict(tensors)
        packed["weight"] = torch.ops.onednn.qlinear_prepack(packed["weight"].contiguous(), None)
        return packed

    def apply(
        self,
        x: Tensor,
        packed: dict[str, Any],
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        weight_scale, weight_sum = packed["weight_scale"], packed.get("weight_sum")
        codes, scale, zero_point = quantize_activation(
            x,
            asymmetric=weight_sum is not None,
            scale=packed.get("input_scale"),
            zero_point=packed.get("input_zero_point"),
        )
        size = weight_scale.shape[0]
        if size not in self._ones:
            self._ones[size] = torch.ones(size), torch.zeros(size, dtype=torch.int32)
        product = torch.ops.onednn.qlinear_pointwise(
            codes.view(torch.uint8) ^ 0x80, 1.0, 128, packed["weight"], *self._ones[size],
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        y = w8a8_epilogue(product, scale, zero_point, weight_scale, weight_sum, packed.get("bias"))
        return y.to(out_dtype or x.dtype)
