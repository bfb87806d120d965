"""Round a block of rows to nearest, as the compressed-tensors package computes and packs it.

Rows do not depend on each other in any scheme here, so a tensor of any size is done a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymllm_quant_ct.packing import words
from pymllm_quant_ct.quantize.scheme import Request
from pymllm_quant_ct.quantize.shards import Entry

ROW_UNIT = 32
"""Rows of a block must be a multiple of this (but for the last): zero points of 4 or 8 bit, packed along the rows,
then fill whole words."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SHRINK = tuple(1 - step / 100 for step in range(1, 21))
"""Ranges that `mse` tries after the whole one: down to 0.80, as llm-compressor's observer does (`maxshrink` 0.2)."""


@dataclass(slots=True)
class Error:
    """Sums of squares of a layer's weights, and of what rounding changed."""

    weights: float = 0.0
    difference: float = 0.0

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the weights."""
        return (self.difference / self.weights) ** 0.5 if self.weights else 0.0


class Rounding:
    """Turns weights into stored tensors. observer ``minmax``: a group's range is that of its weights.
    ``mse``: of that range and shrunk ones, the one of the least squared error.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self.scheme: Any = request.scheme_of_package()
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        self._compressor: Any = BaseCompressor.get_value_from_registry(self.scheme.format.value)
        self._qparams: Any = calculate_qparams
        self._fake_quantize: Any = fake_quantize

    @property
    def packed(self) -> bool:
        return self._request.scheme != "W8A8"

    def entries(self, name: str, shape: tuple[int, ...], dtype: str) -> list[Entry]:
        """The tensors that replace ``NAME.weight`` [N, K]; scales have the weight's dtype."""
        rows, columns = shape
        bits, groups = self._request.bits, columns // (self._request.group or columns)
        found = [Entry(f"{name}.weight_scale", dtype, (rows, groups))]
        if not self.packed:
            return [Entry(f"{name}.weight", "I8", (rows, columns)), *found]
        found.append(Entry(f"{name}.weight_packed", "I32", (rows, words(columns, bits))))
        found.append(Entry(f"{name}.weight_shape", "I64", (2,)))
        if not self._request.symmetric:
            found.append(Entry(f"{name}.weight_zero_point", "I32", (words(rows, bits), groups)))
        return found

    def block(self, weight: Tensor, dtype: str, error: Error) -> dict[str, Tensor]:
        """Stored tensors of some rows [R, K], by their last name; what was lost is added to `error`.

        Computed in float32 (bfloat16 quotients near 127 would be half a code off) with the scales as they are
        stored, so that a code is the one whose weight, read back, is nearest. Raises ValueError where a
        weight is not finite.
        """
        wide = weight.float()
        if not bool(wide.isfinite().all()):
            raise ValueError("holds values that are not finite")
        scale, zero_point = self._range(wide, _DTYPES[dtype])
        state = {"weight": wide, "weight_scale": scale, "weight_zero_point": zero_point}
        stored: dict[str, Tensor] = self._compressor.compress(state, self.scheme)
        # What counts is what a reader gets back.
        back = self._compressor.decompress({**stored, "weight_scale": scale.float()}, self.scheme)["weight"]
        error.weights += float(wide.square().sum(dtype=torch.float64))
        error.difference += float((wide - back).square_().sum(dtype=torch.float64))
        return stored

    def _range(self, wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales in `dtype` and zero points, both [R, groups]."""
        rows, columns = wide.shape
        groups = wide.view(rows, columns // (self._request.group or columns), -1)
        low, high = torch.aminmax(groups, dim=-1)
        scale, zero_point = self._parameters(low, high, dtype)
        if self._request.observer == "minmax":
            return scale, zero_point

        def loss(scale: Tensor, zero_point: Tensor) -> Tensor:
            back: Tensor = self._fake_quantize(wide, scale.float(), zero_point, self.scheme.weights)
            return (back - wide).square_().view_as(groups).sum(-1)

        least = loss(scale, zero_point)
        for share in _SHRINK:
            tried = self._parameters(low * share, high * share, dtype)
            found = loss(*tried)
            better = found < least
            least = torch.where(better, found, least)
            scale = torch.where(better, tried[0], scale)
            zero_point = torch.where(better, tried[1], zero_point)
        return scale, zero_point

    def _parameters(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale, zero_point = self._qparams(low, high, self.scheme.weights)
        scale = scale.to(dtype)
        # The package avoids scales of zero, but float16 may make one of its smallest.
        return torch.where(scale == 0, torch.finfo(dtype).eps, scale), zero_point
