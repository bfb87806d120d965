"""The CPU linear layer of bf16 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm_kernels.cpu_tiles import PACK_BF16, PackedLinear, TiledLinear, Tiles, check_cpu_matrix


class CpuLinear(TiledLinear):
    """The operation ``linear`` for bf16 weights and activations on AVX512-BF16 CPUs.

    Sums are fp32, one chain per output in increasing k.
    """

    FUNCTION = "pymllm_linear"

    def pack(self, weight: Tensor, *, bias: Tensor | None = None, act: str | None = None) -> PackedLinear:
        """Copy a weight into the kernel's layout; the source may be freed afterwards.

        Args:
            weight: [N, K] bf16. With ``act="silu_mul"`` its rows are [gate; up] and N = 2*I.
            bias: [N], any float type, or None.
            act: None or "silu_mul" (silu(gate) * up).

        Raises:
            ValueError: shape, type or activation not supported.
        """
        check_cpu_matrix("weight", weight, torch.bfloat16)
        tiles = Tiles(weight, PACK_BF16, bias=bias, act=act)
        return PackedLinear(tiles, tiles.struct, weight.shape[1])
