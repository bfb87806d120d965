"""The compiled linear nodes of few rows: their recipes, and their C functions as Python calls them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_core.errors import PymllmError
from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.cuda.library import cuda_error, cuda_recipe
from pymllm_kernels.cutlass.tiles import Capability
from pymllm_kernels.jit import load_library
from pymllm_kernels.recipe import Recipe
from pymllm_kernels.triton.launch import gpu

UNIT = {"bfloat16": 8, "int8": 64, "int4": 128}
"""Columns of which K is a multiple, for each format of weights: those of 16 bytes of bfloat16, which is multiplied with
one row of x only, and of a unit of the others (csrc/cuda/tiles.h)."""

MAX_ROWS = 32
MAX_STAGED = 8
"""Rows of x at most, of int4, and of those that blocks hold in shared memory."""

_CUDA_ERROR = 1000


@dataclass(frozen=True, slots=True)
class Format:
    """weights: a key of UNIT. parts: of int4, the scales that a row has in a unit: 1 (or fewer), 2 or 4."""

    weights: str
    parts: int = 1

    @property
    def name(self) -> str:
        return self.weights if self.parts == 1 else f"{self.weights}_g{128 // self.parts}"


FORMATS = (Format("bfloat16"), Format("int8"), Format("int4"), Format("int4", 2), Format("int4", 4))


class Arguments(ctypes.Structure):
    """``FewRowsArguments`` of csrc/cuda/few_rows.h."""

    _fields_ = [
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("x_scale", c_void_p),
        ("weight", c_void_p),
        ("weight_stride", c_int64),
        ("scale", c_void_p),
        ("groups", c_int64),
        ("units_per_group", c_int64),
        ("bias", c_void_p),
        ("norm", c_void_p),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("out", c_void_p),
        ("eps", c_float),
        ("out_float", c_int32),
        ("gated", c_int32),
        ("staged", c_int32),
        ("row_tiles", c_int32),
        ("ahead", c_int32),
        ("warps", c_int32),
        ("blocks", c_int32),
        ("closer", c_int32),
        ("pdl", c_int32),
    ]


class FewRowsError(PymllmError, RuntimeError):
    """A product could not be launched; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is launched.

    row_tiles: of 16 rows of the weight, a block has; with `ahead`: results, a warp has at a time. warps: of a block.
    staged: x is normed or quantised by each block, in shared memory, instead of once before; so is every row with
    `ahead`. ahead: for one row of x and weights of 8 or 16 bits, the loads on their way for each result; 0, of 4 and 8
    bits: the tensor cores multiply.
    blocks: at most, with `ahead`. closer: bytes that a warp asks for while it waits for x, beyond those on their
    way, for each of its tiles or results.
    """

    row_tiles: int
    warps: int
    staged: bool
    ahead: int = 0
    blocks: int = 1 << 30
    closer: int = 0


@dataclass(frozen=True, slots=True)
class Operand:
    """A weight as the kernels read it (csrc/cuda/few_rows.h). n: results of a row. scale: where there is one."""

    weight: Tensor
    n: int
    gated: bool
    scale: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 0
    units_per_group: int = 0


def arguments_of(
    x: Tensor, operand: Operand, out: Tensor, *, norm: Norm | None, residual: Tensor | None
) -> Arguments:
    """The arguments of a product, whatever its plan; the tensors are those of `FewRows`."""
    (m, k), weight = x.shape, operand.weight
    arguments = Arguments(m=m, n=operand.n, k=k, gated=operand.gated, pdl=gpu(x.device).pdl)
    arguments.x, arguments.x_stride = x.data_ptr(), x.stride(0) * x.element_size()
    arguments.weight, arguments.weight_stride = weight.data_ptr(), k * weight.element_size()
    arguments.groups, arguments.units_per_group = operand.groups, operand.units_per_group
    if operand.scale is not None:
        arguments.scale = operand.scale.data_ptr()
    if operand.bias is not None:
        arguments.bias = operand.bias.data_ptr()
    if norm is not None:
        arguments.norm, arguments.eps = norm[0].data_ptr(), norm[1]
    if residual is not None:
        arguments.residual, arguments.residual_stride = residual.data_ptr(), residual.stride(0)
    arguments.out, arguments.out_float = out.data_ptr(), out.dtype == torch.float32
    return arguments


def recipe(form: Format, capability: Capability) -> Recipe:
    """How the library of one format and device is compiled."""
    macros = {"PYMLLM_FORMAT": list(UNIT).index(form.weights), "PYMLLM_PARTS": form.parts}
    return cuda_recipe("few_rows", "few_rows.cu", form.name, macros, capability, seconds=12)


def recipes(capability: Capability, dtypes: Iterable[torch.dtype]) -> list[Recipe]:
    """Every library that a device may ask for; they compute in bfloat16 alone."""
    return [recipe(form, capability) for form in FORMATS] if torch.bfloat16 in dtypes else []


@contextmanager
def stream_of(device: torch.device) -> Iterator[int | None]:
    """The current stream of a device, which is current meanwhile. None for a CPU, on which a test emulates one."""
    if device.type != "cuda":
        yield None
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def reason_of(status: int) -> str:
    """Why a launch has returned a number other than 0."""
    return cuda_error(status - _CUDA_ERROR) if status > _CUDA_ERROR else "no kernel takes the shape"


class FewRows:
    """The kernels of one format, for tensors of one CUDA device."""

    def __init__(self, library: ctypes.CDLL, form: Format) -> None:
        self.format = form
        self._run = library.pymllm_few_rows
        self._run.argtypes, self._run.restype = [POINTER(Arguments), c_void_p], c_int
        if form.weights != "bfloat16":
            self._prepare = library.pymllm_few_rows_prepare
            self._prepare.argtypes = [POINTER(Arguments), c_void_p, c_void_p, c_void_p]
            self._prepare.restype = c_int
        if form.weights == "int4":
            self._widen = library.pymllm_widen_int4
            self._widen.argtypes = [*(c_void_p,) * 2, *(c_int64,) * 2, c_void_p, *(c_int64,) * 4, c_void_p]
            self._widen.restype = c_int

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

        x: [M, K] bfloat16, M from 1 to MAX_ROWS of int4, 8 of int8, 1 of bfloat16; columns side by side, rows at
        multiples of 16 bytes.
        residual: [M, n] bfloat16. Returns [M, n] in `dtype`, bfloat16 or float32. Raises FewRowsError.
        """
        m, k = x.shape
        out = torch.empty((m, operand.n), dtype=dtype, device=x.device)
        arguments = arguments_of(x, operand, out, norm=norm, residual=residual)
        with stream_of(x.device) as stream:
            codes = self.format.weights == "int8"
            if not plan.staged and (codes or (norm is not None and self.format.weights == "int4")):
                ready = torch.empty((m, k), dtype=torch.int8 if codes else x.dtype, device=x.device)
                scales = torch.empty(m, dtype=torch.float32, device=x.device)
                status = self._prepare(byref(arguments), ready.data_ptr(), scales.data_ptr(), stream)
                self._expect_success("norm of x", m, operand.n, k, status)
                arguments.x, arguments.x_stride = ready.data_ptr(), k * ready.element_size()
                arguments.norm, arguments.x_scale = None, scales.data_ptr()
            arguments.staged, arguments.row_tiles, arguments.ahead = plan.staged, plan.row_tiles, plan.ahead
            arguments.warps, arguments.blocks, arguments.closer = plan.warps, plan.blocks, plan.closer
            status = self._run(byref(arguments), stream)
        self._expect_success("product", m, operand.n, k, status)
        return out

    def widen(self, operand: Operand, first: int, wide: Tensor) -> None:
        """Fill wide [rows, K] bfloat16 with the dequantised rows of an int4 weight from `first` on."""
        rows, k = wide.shape
        assert operand.scale is not None
        with stream_of(wide.device) as stream:
            status = self._widen(
                operand.weight.data_ptr(),
                operand.scale.data_ptr(),
                operand.groups,
                operand.units_per_group,
                wide.data_ptr(),
                first,
                rows,
                operand.n,
                k,
                stream,
            )
        self._expect_success("dequantisation", rows, operand.n, k, status)

    def _expect_success(self, what: str, m: int, n: int, k: int, status: int) -> None:
        if status:
            raise FewRowsError(
                f"{what}, {self.format.name} weights, M={m}, N={n}, K={k}: {reason_of(status)}"
            )


@functools.cache
def few_rows_kernels(form: Format, capability: Capability) -> FewRows:
    """The loaded kernels. Raises KernelBuildError where they have to be compiled and cannot."""
    return FewRows(load_library(recipe(form, capability)), form)


def parts_of(group: int) -> int:
    """Scales that a row has in a unit of 128 columns."""
    return max(128 // group, 1)
