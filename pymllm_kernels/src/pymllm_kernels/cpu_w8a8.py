"""The CPU linear layer of int8 weights and int8 activations."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from pymllm_kernels.cpu_tiles import (
    PACK_W8A8,
    PackedLinear,
    TiledLinear,
    Tiles,
    TilesStruct,
    check_cpu_matrix,
    check_names,
)

MAX_K = 1 << 16
"""Sums of 2^16 products of a weight, offset to 0 .. 255, and a code are under 2^31."""


class _W8A8Struct(ctypes.Structure):
    """``PackedW8A8`` of csrc/cpu/linear_w8a8.cpp."""

    _fields_ = [
        ("tiles", TilesStruct),
        ("weight_scale", c_void_p),
        ("weight_sum", c_void_p),
        ("is_static", c_int64),
        ("input_scale", c_double),
        ("input_zero_point", c_int64),
    ]


class CpuW8A8Linear(TiledLinear):
    """The operation ``w8a8_linear`` for bf16 activations on AVX512-VNNI CPUs.

    x is normalised, quantised, multiplied and scaled with the bits of the definition
    (`pymllm_core.nn.quant_ops`): products are exact in int32, and the float32 operations of the epilogue
    follow in its order. Activation and residual are float32, too, before the one rounding of the result.
    """

    FUNCTION = "pymllm_w8a8_linear"

    def pack(self, tensors: dict[str, Tensor], *, act: str | None = None) -> PackedLinear:
        """Copy a weight into the kernel's layout; the sources may be freed afterwards.

        Args:
            tensors: of ``w8a8_linear`` in `pymllm_core.nn.ops`, on the CPU.
            act: None or "silu_mul" (silu(gate) * up, weight rows [gate; up]).

        Raises:
            ValueError: shape, type or activation not supported, or a tensor that is not known.
        """
        known = ("weight", "weight_scale", "weight_sum", "input_scale", "input_zero_point", "bias")
        check_names(tensors, known)
        weight, scale, sums = tensors["weight"], tensors["weight_scale"], tensors.get("weight_sum")
        input_scale, zero_point = tensors.get("input_scale"), tensors.get("input_zero_point")
        check_cpu_matrix("weight", weight, torch.int8)
        n, k = weight.shape
        if k > MAX_K:
            raise ValueError(f"weight has {k} columns, of whose products int32 holds the sums of {MAX_K}")
        if tuple(scale.shape) != (n,) or (sums is not None and tuple(sums.shape) != (n,)):
            raise ValueError(f"weight_scale and weight_sum must have shape ({n},), got {tuple(scale.shape)}")
        if zero_point is not None and (sums is None or input_scale is None):
            raise ValueError("input_zero_point needs input_scale and weight_sum")
        tiles = Tiles(weight, PACK_W8A8, bias=tensors.get("bias"), act=act)
        struct = _W8A8Struct(
            tiles.struct,
            tiles.hold(tiles.by_tile(scale.float())),
            None if sums is None else tiles.hold(tiles.by_tile(sums.to(torch.int32))),
            input_scale is not None,
            0.0 if input_scale is None else float(input_scale),
            0 if zero_point is None else int(zero_point),
        )
        return PackedLinear(tiles, struct, k)
