"""The compiled linear node of many rows in bfloat16: its recipe, and its C function as Python calls it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from ctypes import POINTER, byref, c_int, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_kernels.cuda import few_rows_library as few
from pymllm_kernels.cuda.few_rows_library import FewRowsError, Operand, arguments_of, reason_of, stream_of
from pymllm_kernels.cuda.library import cuda_recipe
from pymllm_kernels.cutlass.tiles import Capability
from pymllm_kernels.jit import load_library
from pymllm_kernels.recipe import Recipe

CAPABILITY: Capability = (9, 0)
"""The only device that has its instructions (csrc/cuda/hopper.h)."""

X_ROWS = (8, 16, 32, 64, 128)
GROUP_ROWS = 64
CHUNK = 128
MAX_STAGES = 12


class Arguments(ctypes.Structure):
    """``ManyRowsArguments`` of csrc/cuda/many_rows.h."""

    _fields_ = [
        ("product", few.Arguments),
        ("x_rows", c_int32),
        ("groups", c_int32),
        ("stages", c_int32),
        ("splits", c_int32),
    ]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is launched.

    x_rows: rows of x that a block has, one of X_ROWS. groups: of GROUP_ROWS rows of the weight, that it has: 1 or 2.
    stages: chunks of CHUNK columns of weights and x that it has room for, 2 to MAX_STAGES. splits: blocks of a
    cluster that share the columns: 1, 2, 4 or 8.
    """

    x_rows: int
    groups: int
    stages: int
    splits: int = 1


def shared_bytes(plan: Plan) -> int:
    """Bytes of shared memory of a block: ``Room`` of csrc/cuda/many_rows.h."""
    width = GROUP_ROWS * plan.groups
    ring, sums = plan.stages * 2 * CHUNK * (width + plan.x_rows), 4 * plan.x_rows * (width + 4)
    return max(ring, sums) + (plan.splits - 1) * width * plan.x_rows * 4 + 8 * (2 * plan.stages + 1)


def recipe(capability: Capability) -> Recipe:
    """How the library is compiled."""
    return cuda_recipe("many_rows", "many_rows.cu", "bfloat16", {}, capability, seconds=5)


def recipes(capability: Capability, dtypes: Iterable[torch.dtype]) -> list[Recipe]:
    """Every library that a device may ask for; it computes in bfloat16 alone."""
    return [recipe(capability)] if torch.bfloat16 in dtypes and capability == CAPABILITY else []


class ManyRows:
    """The kernels, for tensors of one CUDA device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.pymllm_many_rows
        self._run.argtypes, self._run.restype = [POINTER(Arguments), c_void_p], c_int

    def __call__(
        self,
        x: Tensor,
        operand: Operand,
        plan: Plan,
        *,
        residual: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """act(x · Wᵀ + bias) + residual.

        x: [M, K] bfloat16, M at least 1, K a multiple of 8, columns side by side, rows at multiples of 16 bytes.
        operand: a bfloat16 weight at a multiple of 16 bytes. n is even. residual: [M, n] bfloat16, columns side by
        side, rows at multiples of 4 bytes.
        Returns [M, n] in `dtype`, bfloat16 or float32. Raises FewRowsError.
        """
        (m, k), n = x.shape, operand.n
        out = torch.empty((m, n), dtype=dtype, device=x.device)
        arguments = Arguments(arguments_of(x, operand, out, norm=None, residual=residual))
        arguments.x_rows, arguments.groups = plan.x_rows, plan.groups
        arguments.stages, arguments.splits = plan.stages, plan.splits
        with stream_of(x.device) as stream:
            status = self._run(byref(arguments), stream)
        if status:
            raise FewRowsError(f"product of many rows, M={m}, N={n}, K={k}, {plan}: {reason_of(status)}")
        return out


@functools.cache
def many_rows_kernels(capability: Capability) -> ManyRows:
    """The loaded kernels. Raises KernelBuildError where they have to be compiled and cannot."""
    return ManyRows(load_library(recipe(capability)))
