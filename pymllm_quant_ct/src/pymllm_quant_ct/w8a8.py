"""W8A8: 8-bit integer weights and activations, multiplied as integers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pymllm_core.errors import CheckpointError
from pymllm_core.nn import ops
from pymllm_core.protocols.quant import LinearPart, Reader, WeightSlot
from pymllm_quant_ct.config import Activations
from pymllm_quant_ct.storage import Storage

_ONE = ((1,), (), (1, 1))


class Int8Scheme:
    """The `LinearScheme` of the operation ``w8a8_linear``."""

    name = "W8A8"
    operation = ops.W8A8_LINEAR

    def __init__(self, storage: Storage, activations: Activations) -> None:
        layer = storage.layer
        self.shape: Mapping[str, int] = {
            "K": layer.in_features,
            "N": layer.out_features,
            "static": int(activations.static),
            "symmetric": int(activations.symmetric),
        }
        self._storage = storage
        self._activations = activations

    def slots(self) -> list[WeightSlot]:
        return self._storage.slots() + [
            slot for part in self._storage.layer.parts for slot in self._input_slots(part)
        ]

    def _input_slots(self, part: LinearPart) -> list[WeightSlot]:
        """Scale and, where asymmetric, zero point of static activations."""
        if not self._activations.static:
            return []
        slots = [self._storage.one_of(f"{part.name}.input_scale", _ONE, torch.float32)]
        if not self._activations.symmetric:
            slots.append(self._storage.one_of(f"{part.name}.input_zero_point", _ONE, torch.int8))
        return slots

    def load(self, read: Reader, device: torch.device) -> dict[str, Tensor]:
        storage = self._storage
        storage.zero_point(read, device)  # refuses zero points that are stored in spite of symmetry
        weight = storage.codes(read, device)
        tensors = {
            "weight": weight,
            "weight_scale": storage.scale(read, device, torch.float32).view(-1),
            **storage.bias(read, device),
        }
        if not self._activations.symmetric:
            tensors["weight_sum"] = weight.sum(dim=1, dtype=torch.int32)
        if self._activations.static:
            scale, zero_point = self._input(read)
            tensors["input_scale"] = torch.tensor(scale, dtype=torch.float32, device=device)
            if not self._activations.symmetric:
                tensors["input_zero_point"] = torch.tensor(zero_point, dtype=torch.int32, device=device)
        return tensors

    def _input(self, read: Reader) -> tuple[float, int]:
        """Scale and zero point of the common input: of the range that holds those of all parts."""
        found = set()
        for part in self._storage.layer.parts:
            values = []
            for slot in self._input_slots(part):
                tensor = read(slot)
                assert tensor is not None
                values.append(float(tensor.item()))
            scale, zero_point = values[0], int(values[1]) if len(values) > 1 else 0
            if not 0 < scale < float("inf"):
                raise CheckpointError(
                    f"tensor {part.name}.input_scale holds {scale}, expected a positive number"
                )
            found.add((scale, zero_point))
        if len(found) == 1:
            return found.pop()
        if self._activations.symmetric:
            return max(found)
        low = min((-128 - zero_point) * scale for scale, zero_point in found)
        high = max((127 - zero_point) * scale for scale, zero_point in found)
        scale = (high - low) / 255
        return scale, round(-128 - low / scale)
