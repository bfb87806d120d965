"""The CPU linear layers of 4-bit and 8-bit integer weights and bf16 activations."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Literal

import torch
from torch import Tensor

from pymllm_kernels.cpu_tiles import (
    PACK_INT4,
    PACK_INT8,
    PackedLinear,
    TiledLinear,
    Tiles,
    TilesStruct,
    check_cpu_matrix,
    check_names,
)

GROUP_MULTIPLE = 8
"""Of a group's columns, where a row has several: the codes of a dword, so that none spans two groups."""

SPAN = 4
"""Tiles that one row reads side by side (few_tiles_of in csrc/cpu/weight_only_multiply.h): as one stream."""


class _WeightOnlyStruct(ctypes.Structure):
    """``PackedWeightOnly`` of csrc/cpu/linear_weight_only.cpp."""

    _fields_ = [
        ("tiles", TilesStruct),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("groups", c_int64),
        ("group_pairs", c_int64),
        ("bits", c_int64),
        ("order", c_void_p),
    ]


class CpuWeightOnlyLinear(TiledLinear):
    """The operation ``w4a16_linear`` (bits 4) or ``w8a16_linear`` (bits 8) in bf16 on AVX512-BF16 CPUs.

    Codes are multiplied as exact bf16 and scaled in fp32, group by group, so weights are not rounded to bf16
    as the definition's are (`pymllm_core.nn.quant_ops`).
    """

    FUNCTION = "pymllm_weight_only_linear"

    def __init__(self, bits: Literal[4, 8]) -> None:
        super().__init__()
        self._bits = bits

    def pack(self, tensors: dict[str, Tensor], *, act: str | None = None) -> PackedLinear:
        """Copy a weight into the kernel's layout; the sources may be freed afterwards.

        Args:
            tensors: of the operation in `pymllm_core.nn.ops`, on the CPU; ``scale`` in bf16. One group a row
                may have any size, several must have a multiple of 8 columns.
            act: None or "silu_mul" (silu(gate) * up, weight rows [gate; up]).

        Raises:
            ValueError: shape, type or activation not supported, or a tensor that is not known.
        """
        check_names(tensors, ("weight", "scale", "zero_point", "g_idx", "bias"))
        weight, scale, zero_point = tensors["weight"], tensors["scale"], tensors.get("zero_point")
        check_cpu_matrix("weight", weight, torch.uint8 if self._bits == 4 else torch.int8)
        check_cpu_matrix("scale", scale, torch.bfloat16)
        n, k = weight.shape[0], weight.shape[1] * 8 // self._bits
        groups = scale.shape[1]
        if scale.shape[0] != n or not groups:
            raise ValueError(f"scale must have shape ({n}, groups), got {tuple(scale.shape)}")
        if zero_point is not None and (zero_point.shape != scale.shape or zero_point.dtype != torch.int8):
            raise ValueError(
                f"zero_point must be int8 {tuple(scale.shape)}, got {tuple(zero_point.shape)} {zero_point.dtype}"
            )
        size = k // groups
        if groups > 1 and (k % groups or size % GROUP_MULTIPLE):
            raise ValueError(
                f"{groups} groups of {k} columns: groups must have a multiple of {GROUP_MULTIPLE} columns"
            )
        order = None
        if groups > 1 and (g_idx := tensors.get("g_idx")) is not None:
            if tuple(g_idx.shape) != (k,) or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
                raise ValueError(f"g_idx must hold a group under {groups} for each of {k} columns")
            order = group_order(g_idx, groups)
            size = len(order) // groups
            weight = self._reorder(weight, order)
        form = PACK_INT4 if self._bits == 4 else PACK_INT8
        tiles = Tiles(weight, form, bias=tensors.get("bias"), act=act, span=SPAN)
        struct = _WeightOnlyStruct(
            tiles.struct,
            tiles.hold(tiles.by_tile(scale)),
            None if zero_point is None else tiles.hold(tiles.by_tile(zero_point)),
            groups,
            -(-size // 2),
            self._bits,
            None if order is None else tiles.hold(order),
        )
        # The bytes of a 4-bit row say only how many times 8 columns it has.
        padding = 7 if self._bits == 4 and groups == 1 else 0
        return PackedLinear(tiles, struct, k, padding=padding)

    def _reorder(self, weight: Tensor, order: Tensor) -> Tensor:
        """Columns in this order; what stands where there is none is multiplied by zero."""
        columns = order.clamp(min=0).long()
        if self._bits == 8:
            return weight[:, columns]
        codes = weight[:, columns // 2] >> (columns % 2 * 4).to(torch.uint8) & 15
        return codes[:, ::2] | codes[:, 1::2] << 4


def group_order(g_idx: Tensor, groups: int) -> Tensor:
    """The columns of each group in turn, -1 up to the size of the largest, rounded up to a multiple of 8: int32."""
    counts = torch.bincount(g_idx.long(), minlength=groups)
    size = -(-int(counts.max()) // GROUP_MULTIPLE) * GROUP_MULTIPLE
    order = torch.full((groups, size), -1, dtype=torch.int32)
    for group, columns in enumerate(torch.split(g_idx.argsort(stable=True), counts.tolist())):
        order[group, : len(columns)] = columns
    return order.flatten()
