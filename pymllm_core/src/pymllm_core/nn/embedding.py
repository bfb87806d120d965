"""Token embedding: a table of rows, of which a step reads a few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.protocols.quant import Reader, WeightSlot


class Embedding:
    """[T] token ids to [T, hidden_size].

    On a CPU the table stays memory-mapped from the checkpoint: only rows that are used become resident.
    """

    __slots__ = ("slot", "weight")

    def __init__(self, name: str, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.slot = WeightSlot(f"{name}.weight", (vocab_size, hidden_size), dtype)
        self.weight = torch.empty(0)

    def slots(self) -> list[WeightSlot]:
        return [self.slot]

    def load(self, read: Reader, device: torch.device) -> None:
        tensor = read(self.slot)
        assert tensor is not None
        self.weight = tensor.to(device=device, dtype=self.slot.dtype)

    def __call__(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight)
