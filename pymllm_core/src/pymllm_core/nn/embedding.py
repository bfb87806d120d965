"""Token embedding: a table of rows, of which a step reads a few."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pymllm_core.nn import ops
from pymllm_core.nn.quant_ops import dequantize, unpack_int4
from pymllm_core.protocols.quant import LinearScheme, Reader, WeightSlot


class EmbeddingNode(Protocol):
    """[T] token ids to [T, hidden_size]. name: as in the checkpoint, without ``.weight``."""

    name: str
    vocab_size: int
    hidden_size: int

    def __call__(self, input_ids: Tensor) -> Tensor: ...


class Embedding:
    """Rows in the computation's dtype.

    On a CPU the table stays memory-mapped from the checkpoint: only rows that are used become resident.
    """

    __slots__ = ("_look_up", "_slot", "hidden_size", "name", "vocab_size", "weight")

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, dtype: torch.dtype, look_up: ops.LookUp
    ) -> None:
        self.name, self.vocab_size, self.hidden_size = name, vocab_size, hidden_size
        self._look_up = look_up
        self._slot = WeightSlot(f"{name}.weight", (vocab_size, hidden_size), dtype)
        self.weight = torch.empty(0)

    def slots(self) -> list[WeightSlot]:
        return [self._slot]

    def load(self, read: Reader, device: torch.device) -> None:
        tensor = read(self._slot)
        assert tensor is not None
        self.weight = tensor.to(device=device, dtype=self._slot.dtype)

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self._look_up(input_ids, self.weight)


class QuantisedEmbedding:
    """Rows in the format of ``w4a16_linear`` or ``w8a16_linear``, dequantised as they are looked up."""

    __slots__ = ("_tensors", "hidden_size", "name", "scheme", "vocab_size")

    def __init__(self, name: str, vocab_size: int, hidden_size: int, scheme: LinearScheme) -> None:
        assert scheme.operation in (ops.W4A16_LINEAR, ops.W8A16_LINEAR), scheme.operation
        self.name, self.vocab_size, self.hidden_size = name, vocab_size, hidden_size
        self.scheme = scheme
        self._tensors: dict[str, Tensor] = {}

    def slots(self) -> list[WeightSlot]:
        return self.scheme.slots()

    def load(self, read: Reader, device: torch.device) -> None:
        self._tensors = self.scheme.load(read, device)

    def __call__(self, input_ids: Tensor) -> Tensor:
        tensors = self._tensors
        codes = tensors["weight"][input_ids]
        if self.scheme.operation == ops.W4A16_LINEAR:
            codes = unpack_int4(codes, self.hidden_size)
        zero_point = tensors.get("zero_point")
        if zero_point is not None:
            zero_point = zero_point[input_ids]
        return dequantize(codes, tensors["scale"][input_ids], zero_point, tensors.get("g_idx"))
