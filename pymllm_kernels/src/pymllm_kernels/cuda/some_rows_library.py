"""The compiled linear node of some rows, up to 16 in bfloat16: its recipe, and its C function as Python calls it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from ctypes import POINTER, byref, c_int, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.cuda import few_rows_library as few
from pymllm_kernels.cuda.few_rows_library import FewRowsError, Operand, arguments_of, reason_of, stream_of
from pymllm_kernels.cuda.library import cuda_recipe
from pymllm_kernels.cutlass.tiles import Capability
from pymllm_kernels.jit import load_library
from pymllm_kernels.recipe import Recipe

MAX_ROWS = 16
MAX_STAGES = 8
MAX_WARPS = 12


class Arguments(ctypes.Structure):
    """``SomeRowsArguments`` of csrc/cuda/some_rows.h."""

    _fields_ = [("product", few.Arguments), ("block_k", c_int32), ("stages", c_int32), ("splits", c_int32)]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is launched.

    warps: of a block, up to MAX_WARPS, each of which has 16 results. block_k: columns of a chunk, 64 or 128, which
    divide K.
    stages: chunks of weights and x that a block has room for, 2 to MAX_STAGES. splits: blocks of a cluster that
    share the columns, 1, 2, 4 or 8; more than one needs compute capability 9.0.
    """

    warps: int
    block_k: int = 64
    stages: int = 4
    splits: int = 1


def shared_bytes(rows: int, plan: Plan, *, gated: bool, norm: bool) -> int:
    """Bytes of shared memory of a block: ``Room`` of csrc/cuda/some_rows.h."""
    row_tiles, x_tiles, threads = 2 if gated else 1, 1 if rows <= 8 else 2, 32 * plan.warps
    width, height = 16 * row_tiles * plan.warps, 8 * x_tiles
    ring = plan.stages * (width + height + norm) * 2 * plan.block_k
    squares = 4 * height * plan.warps * plan.splits if norm else 0
    inbox = (plan.splits - 1) * 16 * row_tiles * x_tiles * threads
    return max(ring, 4 * height * (width + 4)) + squares + 4 * height + 16 + inbox


def recipe(capability: Capability) -> Recipe:
    """How the library of a device is compiled."""
    return cuda_recipe("some_rows", "some_rows.cu", "bfloat16", {}, capability, seconds=20)


def recipes(capability: Capability, dtypes: Iterable[torch.dtype]) -> list[Recipe]:
    """Every library that a device may ask for; it computes in bfloat16 alone."""
    return [recipe(capability)] if torch.bfloat16 in dtypes else []


class SomeRows:
    """The kernels, for tensors of one CUDA device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.pymllm_some_rows
        self._run.argtypes, self._run.restype = [POINTER(Arguments), c_void_p], c_int

    def __call__(
        self,
        x: Tensor,
        operand: Operand,
        plan: Plan,
        *,
        norm: Norm | None,
        residual: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """act(norm(x) · Wᵀ + bias) + residual.

        x: [M, K] bfloat16, M from 1 to MAX_ROWS, K a multiple of the plan's block_k, columns side by side, rows at
        multiples of 16 bytes. operand: a bfloat16 weight at a multiple of 16 bytes. norm: its weight likewise.
        residual: [M, n] bfloat16, columns side by side. Returns [M, n] in `dtype`, bfloat16 or float32. Raises
        FewRowsError.
        """
        (m, k), n = x.shape, operand.n
        out = torch.empty((m, n), dtype=dtype, device=x.device)
        arguments = Arguments(arguments_of(x, operand, out, norm=norm, residual=residual))
        arguments.product.warps = plan.warps
        arguments.block_k, arguments.stages, arguments.splits = plan.block_k, plan.stages, plan.splits
        with stream_of(x.device) as stream:
            status = self._run(byref(arguments), stream)
        if status:
            raise FewRowsError(f"product of some rows, M={m}, N={n}, K={k}, {plan}: {reason_of(status)}")
        return out


@functools.cache
def some_rows_kernels(capability: Capability) -> SomeRows:
    """The loaded kernels. Raises KernelBuildError where they have to be compiled and cannot."""
    return SomeRows(load_library(recipe(capability)))
