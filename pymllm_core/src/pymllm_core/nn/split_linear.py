"""A fused linear whose parts are stored unlike: each runs in its own format, the results are joined."""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm_core.nn import ops
from pymllm_core.nn.linear import Linear
from pymllm_core.nn.norm import RMSNorm
from pymllm_core.protocols.quant import LinearLayer, Reader, WeightSlot


class SplitLinear:
    """The node of `nn.linear.Linear`, composed of one linear for each part of `layer`."""

    __slots__ = ("layer", "parts")

    def __init__(self, layer: LinearLayer, parts: list[Linear]) -> None:
        self.layer = layer
        self.parts = parts

    def slots(self) -> list[WeightSlot]:
        return [slot for part in self.parts for slot in part.slots()]

    def load(self, read: Reader, device: torch.device) -> None:
        for part in self.parts:
            part.load(read, device)

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x: [M, in_features]. The norm is computed once for all parts."""
        if norm is not None:
            x = norm(x)
        y = torch.cat([part(x, out_dtype=out_dtype) for part in self.parts], dim=-1)
        if self.layer.act is not None:
            y = ops.silu_mul(y)
        return y if residual is None else y + residual
