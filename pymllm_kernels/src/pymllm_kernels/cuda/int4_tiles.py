"""Weights of 4 bits in the order in which csrc/cuda/tiles.h reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm_kernels.triton.launch import ceil_div


def to_tiles(packed: Tensor, halves: int) -> Tensor:
    """[N, K / 2] uint8 as in `quant_ops.unpack_int4` to the words that csrc/cuda/tiles.h reads, int32.

    A unit of a tile of 16 rows, 1 KiB, lies in the order in which a warp's lanes load it: [tiles, K / 128, row / 8,
    row % 8, t, j]. Each of the halves, gate and up, is filled up to whole tiles.
    """
    rows, width = packed.shape
    words = packed.contiguous().view(torch.int32).view(halves, rows // halves, width // 4)
    missing = -(rows // halves) % 16
    if missing:
        words = torch.nn.functional.pad(words, (0, 0, 0, missing))
    tiles = halves * ceil_div(rows // halves, 16)
    return words.reshape(tiles, 2, 8, width // 64, 4, 4).permute(0, 3, 1, 2, 5, 4).contiguous()


def to_constants(scale: Tensor, offset: Tensor | None, halves: int) -> Tensor:
    """scale, offset (-136 - zero point): [N, G] bfloat16 to [tiles, G, 16] int32, both in a word, in the words' tiles.

    Exact: bfloat16 has 8 bits for 128 to 143.
    """
    rows, groups = scale.shape
    if offset is None:
        offset = torch.full_like(scale, -136)
    # The first of two halves of a word is the lower one: GPUs and the CPUs beside them are little-endian.
    words = torch.stack((scale, offset), dim=-1).view(torch.int32).view(halves, rows // halves, groups)
    missing = -(rows // halves) % 16
    if missing:
        words = torch.nn.functional.pad(words, (0, 0, 0, missing))
    return words.reshape(-1, 16, groups).transpose(1, 2).contiguous()
