"""The tensors that compressed-tensors stores for a module, and how those of fused parts are put together.

Names and shapes: ``compressors/pack_quantized``, ``naive_quantized`` and ``quantization/lifecycle`` of the
package. Some differ between versions, so of several known shapes the stored one is expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymllm_core.errors import CheckpointError
from pymllm_core.nn.linear import fuse
from pymllm_core.protocols.quant import LinearLayer, LinearPart, Reader, Stored, WeightSlot
from pymllm_quant_ct.config import ROOT, Group, Weights
from pymllm_quant_ct.packing import pack, unpack, unpack_rows, words

Shape = tuple[int, ...]
_ONE: tuple[Shape, ...] = ((1,), (), (1, 1))


class Storage:
    """Reads the codes, scales, zero points and bias of one layer; one place for what all schemes store."""

    def __init__(self, layer: LinearLayer, group: Group, dtype: torch.dtype, stored: Stored | None) -> None:
        assert group.weights is not None
        self.layer = layer
        self.weights: Weights = group.weights
        self._packed = group.packed
        self._dtype = dtype
        self._stored = stored or {}
        size = self.weights.group_size or layer.in_features
        if layer.in_features % size:
            raise CheckpointError(
                f"{ROOT}.{group.field}.weights.group_size is {size}, which does not divide the "
                f"{layer.in_features} columns of {layer.parts[0].name}"
            )
        self.group_size = size
        self.groups = layer.in_features // size

    # -- what is stored --------------------------------------------------------------------------------

    def one_of(self, name: str, shapes: tuple[Shape, ...], dtype: torch.dtype) -> WeightSlot:
        """A slot of that one of the known `shapes` which is stored, else of the first."""
        found = self._stored.get(name)
        return WeightSlot(name, found if found in shapes else shapes[0], dtype)

    def slots(self) -> list[WeightSlot]:
        """Codes, scales, zero points and bias of all parts."""
        slots = []
        for part in self.layer.parts:
            slots += [self._codes(part), self._scale(part)]
            if self._packed:
                slots.append(self._shape(part))
            if (zero_point := self._zero_point(part)) is not None:
                slots.append(zero_point)
            if self.layer.bias:
                slots.append(self._bias(part))
        return slots

    def _codes(self, part: LinearPart) -> WeightSlot:
        rows, columns = part.out_features, self.layer.in_features
        if self._packed:
            shape = (rows, words(columns, self.weights.num_bits))
            return WeightSlot(f"{part.name}.weight_packed", shape, torch.int32, exact=True)
        return WeightSlot(f"{part.name}.weight", (rows, columns), torch.int8, exact=True)

    def _shape(self, part: LinearPart) -> WeightSlot:
        return WeightSlot(f"{part.name}.weight_shape", (2,), torch.int64, optional=True)

    def _scale(self, part: LinearPart) -> WeightSlot:
        return self.one_of(f"{part.name}.weight_scale", self._unpacked_shapes(part), self._dtype)

    def _zero_point(self, part: LinearPart) -> WeightSlot | None:
        name, shapes = f"{part.name}.weight_zero_point", self._unpacked_shapes(part)
        if self.weights.symmetric:
            # Old versions store the zeros of symmetric weights, too.
            found = self._stored.get(name)
            return WeightSlot(name, found, torch.int8, optional=True) if found in shapes else None
        if self._packed and self.weights.strategy != "tensor":  # unpacked before 0.9.4
            packed = (words(part.out_features, self.weights.num_bits), self.groups)
            if self._stored.get(name, packed) == packed:
                return WeightSlot(name, packed, torch.int32)
        return self.one_of(name, shapes, torch.int8)

    def _bias(self, part: LinearPart) -> WeightSlot:
        return WeightSlot(f"{part.name}.bias", (part.out_features,), self._dtype)

    def _unpacked_shapes(self, part: LinearPart) -> tuple[Shape, ...]:
        if self.weights.strategy == "tensor":
            return _ONE
        rows = part.out_features
        return ((rows, self.groups),) if self.weights.strategy == "group" else ((rows, 1), (rows,))

    # -- reading ---------------------------------------------------------------------------------------

    def codes(self, read: Reader, device: torch.device) -> Tensor:
        """[N, K] int8; for 4 bit [N, 4 words] uint8, two codes a byte."""
        bits, columns = self.weights.num_bits, self.layer.in_features
        for part in self.layer.parts if self._packed else ():
            shape = read(self._shape(part))
            if shape is not None and shape.tolist() != [part.out_features, columns]:
                raise CheckpointError(
                    f"tensor {part.name}.weight_shape holds {shape.tolist()}, "
                    f"expected {[part.out_features, columns]}"
                )
        fused = fuse([self._codes(part) for part in self.layer.parts], read, device)
        if bits == 4:
            return (fused if self._packed else pack(fused, bits)).view(torch.uint8)
        return unpack(fused, bits, columns) if self._packed else fused

    def scale(self, read: Reader, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[N, G]; one scale for a whole part is repeated for its rows."""
        parts = [(part, read(self._scale(part))) for part in self.layer.parts]
        return self._rows(parts, device, dtype)

    def zero_point(self, read: Reader, device: torch.device) -> Tensor | None:
        """[N, G] int8, None for symmetric weights."""
        parts = []
        for part in self.layer.parts:
            slot = self._zero_point(part)
            found = read(slot) if slot is not None else None
            if self.weights.symmetric:
                if found is not None and bool(found.any()):
                    raise CheckpointError(
                        f"tensor {part.name}.weight_zero_point is not zero, but weights.symmetric is true"
                    )
                continue
            assert found is not None
            if found.dtype == torch.int32 and self._packed and self.weights.strategy != "tensor":
                found = unpack_rows(found, self.weights.num_bits, part.out_features)
            parts.append((part, found))
        return self._rows(parts, device, torch.int8) if parts else None

    def bias(self, read: Reader, device: torch.device) -> dict[str, Tensor]:
        """``bias`` [N], where the layer has one."""
        if not self.layer.bias:
            return {}
        return {"bias": fuse([self._bias(part) for part in self.layer.parts], read, device)}

    def _rows(
        self, parts: Sequence[tuple[LinearPart, Tensor | None]], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        fused = torch.empty((self.layer.out_features, self.groups), dtype=dtype, device=device)
        start = 0
        for part, tensor in parts:
            assert tensor is not None
            shape = (1, 1) if self.weights.strategy == "tensor" else (part.out_features, self.groups)
            fused[start : start + part.out_features].copy_(tensor.reshape(shape))
            start += part.out_features
        return fused
