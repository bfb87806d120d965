"""An output head quantised to 8 bits as it is loaded (``--quantization.lm_head int8``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pymllm_core.nn import ops
from pymllm_core.protocols.quant import LinearLayer, Reader, WeightSlot


class Int8HeadScheme:
    """The `LinearScheme` that reads a weight in full precision and serves it as ``w8a16_linear``.

    Each row has one scale, its largest absolute value / 127, and a weight is off by half of it at most. A head
    of 151,936 rows is a quarter of the bytes that Qwen3-0.6B reads for a token; this halves it, as llama.cpp's
    quantised files do with theirs.
    """

    name = "int8 head"
    operation = ops.W8A16_LINEAR

    BLOCK = 1 << 23
    """Weights that are quantised at a time."""

    def __init__(self, layer: LinearLayer, dtype: torch.dtype) -> None:
        (part,) = layer.parts
        columns = layer.in_features
        self.shape: Mapping[str, int] = {
            "K": columns,
            "N": part.out_features,
            "group_size": columns,
            "groups": 1,
            "symmetric": 1,
            "g_idx": 0,
        }
        self._slot = WeightSlot(f"{part.name}.weight", (part.out_features, columns), dtype)

    def slots(self) -> list[WeightSlot]:
        return [self._slot]

    @property
    def resident_bytes(self) -> int:
        """What is held after loading: codes and scales."""
        rows, columns = self._slot.shape
        return rows * (columns + self._slot.dtype.itemsize)

    def load(self, read: Reader, device: torch.device) -> dict[str, Tensor]:
        stored = read(self._slot)
        assert stored is not None
        rows, columns = self._slot.shape
        weight = torch.empty((rows, columns), dtype=torch.int8, device=device)
        scale = torch.empty((rows, 1), dtype=self._slot.dtype, device=device)
        step = max(self.BLOCK // columns, 1)
        for start in range(0, rows, step):
            block = slice(start, start + step)
            wide = stored[block].to(device=device, dtype=torch.float32)
            # The codes are of the scale as it is kept, rounded to the computation's dtype.
            scale[block] = wide.abs().amax(dim=1, keepdim=True) / 127
            divisor = scale[block].float()
            codes = (wide / torch.where(divisor > 0, divisor, 1.0)).round_()
            weight[block] = codes.clamp_(-127, 127).to(torch.int8)
        return {"weight": weight, "scale": scale}
