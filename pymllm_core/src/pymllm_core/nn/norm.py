"""RMSNorm: a weight that is either applied here or handed to a fused node."""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm_core.nn.ops import rms_norm
from pymllm_core.protocols.quant import Reader, WeightSlot


class RMSNorm:
    """Root mean square norm over the last dimension; see `ops.rms_norm`."""

    __slots__ = ("_slot", "eps", "weight")

    def __init__(self, name: str, size: int, eps: float, dtype: torch.dtype) -> None:
        self._slot = WeightSlot(f"{name}.weight", (size,), dtype)
        self.eps = eps
        self.weight = torch.empty(0)

    def slots(self) -> list[WeightSlot]:
        return [self._slot]

    def load(self, read: Reader, device: torch.device) -> None:
        tensor = read(self._slot)
        assert tensor is not None
        # A copy, so that a few numbers do not keep the file's mapping alive.
        self.weight = torch.empty_like(tensor, dtype=self._slot.dtype, device=device).copy_(tensor)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
