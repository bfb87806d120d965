"""Linear nodes with our own CUDA kernels for few rows; for many, what Triton, CUTLASS and cuBLAS do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm_core.protocols.kernel import LinearKernel, Norm
from pymllm_kernels.cuda.few_rows_library import (
    MAX_ROWS,
    FewRows,
    Format,
    Operand,
    few_rows_kernels,
    parts_of,
)
from pymllm_kernels.cuda.few_rows_plan import (
    SMALL,
    one_row_is_ours,
    one_row_plan,
    tiles_plan,
)
from pymllm_kernels.cuda.int4_tiles import to_constants, to_tiles
from pymllm_kernels.cuda.many_rows_library import CAPABILITY as MANY_ROWS_CAPABILITY
from pymllm_kernels.cuda.many_rows_library import ManyRows, many_rows_kernels
from pymllm_kernels.cuda.many_rows_plan import many_rows_plan
from pymllm_kernels.cuda.some_rows_library import MAX_ROWS as SOME_ROWS
from pymllm_kernels.cuda.some_rows_library import SomeRows, some_rows_kernels
from pymllm_kernels.cuda.some_rows_plan import some_rows_plan
from pymllm_kernels.cutlass.library import why_not_here
from pymllm_kernels.cutlass.w8a8 import CutlassW8A8
from pymllm_kernels.triton.launch import gpu
from pymllm_kernels.triton.linear import DenseWeight, TritonLinear
from pymllm_kernels.triton.norm import rms_norm
from pymllm_kernels.triton.w8a8 import Int8Weight, TritonW8A8
from pymllm_kernels.triton.widened import many_rows

_OUT = (torch.bfloat16, torch.float32)


def ready(x: Tensor) -> Tensor:
    """x [M, K] as the kernels read it: columns side by side, rows at multiples of 16 bytes."""
    aligned = x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def columns_adjacent(residual: Tensor | None) -> Tensor | None:
    return residual if residual is None or residual.stride(1) == 1 else residual.contiguous()


def in_pairs(residual: Tensor | None) -> Tensor | None:
    """The residual [M, N] bfloat16, N even, as pairs of neighbours at multiples of 4 bytes."""
    if residual is None or (
        residual.stride(1) == 1 and residual.stride(0) % 2 == 0 and residual.data_ptr() % 4 == 0
    ):
        return residual
    return residual.clone(memory_format=torch.contiguous_format)


MAX_NORMED = 1 << 14
"""Columns up to which shared memory has room for a row and the norm's weight, on every device."""


def normed(x: Tensor, norm: Norm | None) -> tuple[Tensor, Norm | None]:
    """The norm of a row that is too long for the kernels is a launch of its own."""
    return (x, norm) if norm is None or x.shape[1] <= MAX_NORMED else (rms_norm(ready(x), *norm), None)


@dataclass(frozen=True, slots=True)
class PackedDense:
    """own: the weight for our kernels. rest: for those of many rows."""

    own: Operand
    rest: DenseWeight


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """own: the weight for our kernels, None where they do not take it. rest: for `many`, which takes many rows."""

    own: Operand | None
    rest: Int8Weight
    many: LinearKernel


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """kernels: those of the weight's groups, of which a model may have several sizes."""

    own: Operand
    kernels: FewRows


class CudaLinear:
    """`protocols.kernel.LinearKernel` for ``linear`` in bfloat16.

    One row of some weights; 2 to 256 rows on Hopper; 2 to 16 rows where K is a multiple of 64. The rest is
    `TritonLinear`'s.
    """

    fuses = TritonLinear.fuses

    def __init__(self) -> None:
        self._rest = TritonLinear()
        self._kernels: FewRows | None = None
        self._some: SomeRows | None = None
        self._many: ManyRows | None = None

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> PackedDense:
        """Raises KernelBuildError where the kernels have to be compiled and cannot."""
        weight = tensors["weight"]
        self._kernels = kernels_for(weight, Format("bfloat16"))
        self._some = some_kernels_for(weight)
        self._many = many_kernels_for(weight)
        rest = self._rest.pack(tensors, act=act)
        bias = None if rest.bias is None else rest.bias.float()
        return PackedDense(Operand(rest.weight, rest.out_features, rest.gated, bias=bias), rest)

    def apply(
        self,
        x: Tensor,
        packed: PackedDense,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        (rows, k), own, dtype = x.shape, packed.own, out_dtype or x.dtype
        device = gpu(x.device)
        if dtype not in _OUT or rows == 0:
            return self._rest.apply(x, packed.rest, norm=norm, residual=residual, out_dtype=out_dtype)
        many = many_rows_plan(rows, own.n, k, device.sms, gated=own.gated, shared=device.shared)
        if self._many is not None and many is not None:
            x = ready(x) if norm is None else rms_norm(ready(x), *norm)
            return self._many(x, own, many, residual=in_pairs(residual), dtype=dtype)
        if rows == 1:
            if own.weight.numel() * 2 < SMALL or not one_row_is_ours(own.n, k, device.sms):
                return self._rest.apply(x, packed.rest, norm=norm, residual=residual, out_dtype=out_dtype)
            assert self._kernels is not None
            plan = one_row_plan(own.n, k, device.sms, gated=own.gated, bits=16)
            x, norm = normed(ready(x), norm)
            return self._kernels(x, own, plan, norm=norm, residual=columns_adjacent(residual), dtype=dtype)
        if rows > SOME_ROWS or k % 64:
            return self._rest.apply(x, packed.rest, norm=norm, residual=residual, out_dtype=out_dtype)
        assert self._some is not None
        some = some_rows_plan(
            rows, own.n, k, device.sms,
            gated=own.gated, normed=norm is not None, shared=device.shared, clusters=device.major >= 9,
        )  # fmt: skip
        return self._some(ready(x), own, some, norm=norm, residual=columns_adjacent(residual), dtype=dtype)


class CudaW8A8:
    """`protocols.kernel.LinearKernel` for ``w8a8_linear`` in bfloat16.

    Up to 8 rows whose scales are found row by row, symmetrically; the rest is CUTLASS's or, where that cannot be
    had, Triton's.
    """

    fuses = TritonW8A8.fuses

    def __init__(self) -> None:
        self._triton, self._cutlass = TritonW8A8(), CutlassW8A8()
        self._kernels: FewRows | None = None

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> PackedInt8:
        """Raises KernelBuildError where the kernels have to be compiled and cannot."""
        weight = tensors["weight"]
        self._kernels = kernels_for(weight, Format("int8"))
        many = self._cutlass if cutlass_takes(weight) else self._triton
        rest = many.pack(tensors, act=act)
        if rest.sum is not None or rest.static.scale is not None:
            return PackedInt8(None, rest, many)
        bias = None if rest.bias is None else rest.bias.float()
        return PackedInt8(Operand(rest.weight, rest.out_features, rest.gated, rest.scale, bias), rest, many)

    def apply(
        self,
        x: Tensor,
        packed: PackedInt8,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        (rows, k), own, dtype = x.shape, packed.own, out_dtype or x.dtype
        assert self._kernels is not None
        if own is None or dtype not in _OUT or not 1 <= rows <= 8:
            return packed.many.apply(x, packed.rest, norm=norm, residual=residual, out_dtype=out_dtype)
        sms = gpu(x.device).sms
        x, norm = normed(x, norm)
        if rows == 1:
            plan = one_row_plan(own.n, k, sms, gated=own.gated, bits=8)
        else:
            plan = tiles_plan(rows, own.n, k, sms, gated=own.gated, weights="int8")
        return self._kernels(ready(x), own, plan, norm=norm, residual=columns_adjacent(residual), dtype=dtype)


MAX_PASSES = 2
"""So many times MAX_ROWS rows read the weights again; more are multiplied by widened weights."""


class CudaW4A16:
    """`protocols.kernel.LinearKernel` for ``w4a16_linear`` in bfloat16 and groups of 32, 64 or a multiple of 128.

    Up to MAX_PASSES times MAX_ROWS rows on the codes; more with cuBLAS on weights that are widened for it.
    """

    fuses = TritonLinear.fuses

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> PackedInt4:
        """Raises KernelBuildError where the kernels have to be compiled and cannot."""
        weight, scale = tensors["weight"], tensors["scale"]
        gated, (rows, groups) = act is not None, scale.shape
        group = weight.shape[1] * 2 // groups
        kernels = kernels_for(weight, Format("int4", parts_of(group)))
        offsets = (-136 - tensors["zero_point"].to(scale.dtype)) if "zero_point" in tensors else None
        halves = 2 if gated else 1
        bias = tensors.get("bias")
        own = Operand(
            to_tiles(weight, halves),
            rows // halves,
            gated,
            to_constants(scale, offsets, halves),
            None if bias is None else bias.float(),
            groups,
            max(group // 128, 1),
        )
        return PackedInt4(own, kernels)

    def apply(
        self,
        x: Tensor,
        packed: PackedInt4,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        (rows, k), dtype, own, kernels = x.shape, out_dtype or x.dtype, packed.own, packed.kernels
        n, gated = own.n, own.gated
        if rows > MAX_PASSES * MAX_ROWS:
            total = n * (2 if gated else 1)
            return many_rows(
                x,
                lambda first, wide: kernels.widen(own, first, wide),
                total,
                None if own.bias is None else own.bias.to(x.dtype),
                norm,
                residual,
                dtype,
                gated=gated,
            )
        x, residual = ready(x), columns_adjacent(residual)
        if rows > MAX_ROWS:
            halves = [slice(0, MAX_ROWS), slice(MAX_ROWS, rows)]
            parts = [
                self.apply(
                    x[half],
                    packed,
                    norm=norm,
                    residual=None if residual is None else residual[half],
                    out_dtype=dtype,
                )
                for half in halves
            ]
            return torch.cat(parts)
        if rows == 0:
            return torch.empty((0, n), dtype=dtype, device=x.device)
        x, norm = normed(x, norm)
        plan = tiles_plan(rows, n, k, gpu(x.device).sms, gated=gated, weights="int4")
        # Results are rounded once, whatever they are rounded to.
        rounded = dtype if dtype in _OUT else torch.float32
        return kernels(x, own, plan, norm=norm, residual=residual, dtype=rounded).to(dtype)


def cutlass_takes(weight: Tensor) -> bool:
    """Whether CUTLASS multiplies many rows by an int8 weight [N, K]."""
    capability = torch.cuda.get_device_capability(weight.device)
    return weight.shape[0] % 16 == 0 and why_not_here(capability, "bfloat16") is None


def kernels_for(weight: Tensor, form: Format) -> FewRows:
    """The kernels of few rows for the weight's device."""
    return few_rows_kernels(form, torch.cuda.get_device_capability(weight.device))


def some_kernels_for(weight: Tensor) -> SomeRows:
    """Those of some rows."""
    return some_rows_kernels(torch.cuda.get_device_capability(weight.device))


def many_kernels_for(weight: Tensor) -> ManyRows | None:
    """Those of many rows, where the device has their instructions."""
    capability = torch.cuda.get_device_capability(weight.device)
    return many_rows_kernels(capability) if capability == MANY_ROWS_CAPABILITY else None
