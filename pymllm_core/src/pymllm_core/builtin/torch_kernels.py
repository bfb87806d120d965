"""The core's own kernels: the named operations by what torch offers, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.nn import moe_ops, ops
from pymllm_core.protocols.kernel import Norm


class TorchLinear:
    """``linear`` through `F.linear`: every device and dtype."""

    fuses = frozenset({"bias"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> tuple[Tensor, Tensor | None]:
        return tensors["weight"], tensors.get("bias")

    def apply(
        self,
        x: Tensor,
        packed: tuple[Tensor, Tensor | None],
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        y = F.linear(x, *packed)
        return y if out_dtype is None else y.to(out_dtype)


class OneDnnLinear:
    """``linear`` through oneDNN with weights reordered once: 1.6 times `F.linear` at one row (bf16, CPU)."""

    fuses = frozenset({"bias"})

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> tuple[Any, Tensor | None]:
        return torch.ops.mkldnn._reorder_linear_weight(tensors["weight"].contiguous(), 1), tensors.get("bias")

    def apply(
        self,
        x: Tensor,
        packed: tuple[Any, Tensor | None],
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        weight, bias = packed
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y if out_dtype is None else y.to(out_dtype)


def torch_embedding() -> ops.LookUp:
    """``embedding`` by its definition."""
    return ops.embedding


def torch_attention_prep() -> ops.AttentionPrep:
    """``attention_prep`` by its definition."""
    return ops.attention_prep


def torch_route() -> moe_ops.Route:
    """``moe_route`` by its definition."""
    return moe_ops.route


def self_check() -> str:
    """Multiply two small matrices on the CPU; what was done, for ``pymllm doctor``."""
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    kernel = TorchLinear()
    y = kernel.apply(x, kernel.pack({"weight": weight}, act=None))
    if not torch.allclose(y, x @ weight.T, atol=1e-5):
        raise RuntimeError("F.linear gave a wrong product")
    return "multiplied 3x8 by 8x5 with PyTorch on the CPU"
