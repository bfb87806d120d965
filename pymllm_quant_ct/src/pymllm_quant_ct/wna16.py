"""W4A16 and W8A16: integer weights, activations in the computation's dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pymllm_core.errors import CheckpointError
from pymllm_core.nn import ops
from pymllm_core.protocols.quant import Reader, WeightSlot
from pymllm_quant_ct.storage import Storage


class WeightOnlyScheme:
    """The `LinearScheme` of the operations ``w4a16_linear`` and ``w8a16_linear``."""

    def __init__(self, storage: Storage, dtype: torch.dtype) -> None:
        weights, layer = storage.weights, storage.layer
        self.name = f"W{weights.num_bits}A16"
        self.operation = ops.W4A16_LINEAR if weights.num_bits == 4 else ops.W8A16_LINEAR
        self.shape: Mapping[str, int] = {
            "K": layer.in_features,
            "N": layer.out_features,
            "group_size": storage.group_size,
            "groups": storage.groups,
            "symmetric": int(weights.symmetric),
            "g_idx": int(weights.g_idx),
        }
        self._storage = storage
        self._dtype = dtype

    def slots(self) -> list[WeightSlot]:
        return self._storage.slots() + ([self._g_idx()] if self._storage.weights.g_idx else [])

    def _g_idx(self) -> WeightSlot:
        # One part only: parts with an order of their own are not fused (`method`).
        layer = self._storage.layer
        return WeightSlot(f"{layer.parts[0].name}.weight_g_idx", (layer.in_features,), torch.int32)

    def load(self, read: Reader, device: torch.device) -> dict[str, Tensor]:
        storage = self._storage
        tensors = {
            "weight": storage.codes(read, device),
            "scale": storage.scale(read, device, self._dtype),
            **storage.bias(read, device),
        }
        if (zero_point := storage.zero_point(read, device)) is not None:
            tensors["zero_point"] = zero_point
        if storage.weights.g_idx:
            slot = self._g_idx()
            g_idx = read(slot)
            assert g_idx is not None
            low, high = int(g_idx.min()), int(g_idx.max())
            if low < -1 or high >= storage.groups:
                raise CheckpointError(
                    f"tensor {slot.name} holds indices from {low} to {high}, but there are {storage.groups} groups"
                )
            if low >= 0:  # -1 says that the columns were not reordered
                tensors["g_idx"] = g_idx.to(device=device, dtype=torch.int32, copy=True)
        return tensors
