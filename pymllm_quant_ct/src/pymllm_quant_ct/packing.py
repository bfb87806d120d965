"""Integers packed into int32 words, as compressed-tensors stores them: 4 and 8 bit.

A code q of b bits becomes u = q + 2^(b-1); element k lies in word k // (32 / b), the first in the lowest bits.
On little-endian machines the words' bytes therefore hold the codes in order.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

if sys.byteorder != "little":
    raise ImportError("pymllm-quant-ct reads packed words as bytes, which needs a little-endian machine")


def words(count: int, num_bits: int) -> int:
    """How many int32 hold `count` codes."""
    return -(-count * num_bits // 32)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """[N, K] int8 to [N, words(K)] int32; what is left of the last word holds zero bits."""
    rows, columns = codes.shape
    width = words(columns, num_bits) * 32 // num_bits
    wide = torch.zeros((rows, width), dtype=torch.uint8, device=codes.device)
    wide[:, :columns] = (codes.to(torch.int16) + (1 << (num_bits - 1))).to(torch.uint8)
    if num_bits == 4:
        wide = wide[:, ::2] | (wide[:, 1::2] << 4)
    return wide.view(torch.int32)


def unpack(packed: Tensor, num_bits: int, columns: int) -> Tensor:
    """[N, words(columns)] int32 to [N, columns] int8."""
    # Flat first: a transposed matrix of one column calls itself contiguous, but has no stride of 1.
    found = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], -1)
    if num_bits == 8:
        return (found[:, :columns] ^ 0x80).view(torch.int8)
    codes = torch.stack((found & 15, found >> 4), dim=-1).flatten(-2)[:, :columns]
    return codes.to(torch.int8) - 8


def unpack_rows(packed: Tensor, num_bits: int, rows: int) -> Tensor:
    """Zero points, packed along the rows: [words(rows), G] int32 to [rows, G] int8."""
    return unpack(packed.t(), num_bits, rows).t().contiguous()
