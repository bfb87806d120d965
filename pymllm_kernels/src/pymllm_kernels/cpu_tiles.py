"""What the CPU linears of all formats share: the packed weight and the call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from pymllm_core.nn.memory import zeros_on_demand
from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.cpu_library import cpu_library

TILE = 32  # output columns in a weight tile, kTileCols in csrc/cpu/linear.h
_ACTS: dict[str | None, int] = {None: 0, "silu_mul": 1}

# PackFormat in csrc/cpu/linear_pack.h
PACK_BF16, PACK_W8A8, PACK_INT4, PACK_INT8 = range(4)


class TilesStruct(ctypes.Structure):
    """``PackedLinear`` of csrc/cpu/linear.h."""

    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("n_out", c_int64),
        ("dwords", c_int64),
        ("tiles", c_int64),
        ("act", c_int64),
        ("span", c_int64),
    ]


class Tiles:
    """The weight of one linear in tiles of 32 columns, on 2 MB pages, and what belongs to its columns.

    Attributes:
        n_out: columns of the result (I for ``silu_mul`` over a weight of 2*I rows).
        struct: for the C functions.
        nbytes: memory held.
    """

    def __init__(
        self, rows: Tensor, form: int, *, bias: Tensor | None, act: str | None, span: int = 1
    ) -> None:
        """rows: [N, B], last dimension contiguous: B bytes a row, in the form that `form` packs.

        act: None or "silu_mul" (silu(gate) * up; the rows are [gate; up]). bias: [N], any float type.
        span: tiles whose dwords alternate.

        Raises ValueError: shape or activation not supported.
        """
        if act not in _ACTS:
            raise ValueError(f"act must be one of {list(_ACTS)}, got {act!r}")
        n, size = rows.shape[0], rows.shape[1] * rows.itemsize
        if n == 0 or size == 0 or (act == "silu_mul" and n % 2):
            raise ValueError(f"weight of shape {tuple(rows.shape)} cannot be packed with act={act!r}")
        if bias is not None and tuple(bias.shape) != (n,):
            raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        self._act = act
        self._held: list[Tensor] = []
        self.n_out = n // 2 if act == "silu_mul" else n
        tiles = -(-self.n_out // (TILE // 2 if act == "silu_mul" else TILE))
        dwords = -(-size // 4)
        weight = zeros_on_demand((tiles * dwords * TILE * 4,), torch.uint8)
        self.struct = TilesStruct(self.hold(weight), None, self.n_out, dwords, tiles, _ACTS[act], span)
        if bias is not None:
            self.struct.bias = self.hold(self.by_tile(bias.float()))
        cpu_library().pymllm_linear_pack(
            rows.data_ptr(),
            rows.stride(0) * rows.itemsize,
            size,
            ctypes.addressof(self.struct),
            form,
            torch.get_num_threads(),
        )

    def hold(self, tensor: Tensor) -> int:
        """Keep a tensor alive as long as this; its address."""
        self._held.append(tensor)
        return tensor.data_ptr()

    def by_tile(self, values: Tensor) -> Tensor:
        """Values of the weight's rows [N, ...] in the column order of the tiles, zero padded: [tiles, ..., 32]."""
        tiles, rest = self.struct.tiles, values.shape[1:]
        halves = 2 if self._act == "silu_mul" else 1
        columns = TILE // halves
        padded = values.new_zeros((halves, tiles * columns, *rest))
        padded[:, : self.n_out] = values.reshape(halves, self.n_out, *rest)
        tiled = padded.view(halves, tiles, columns, *rest).transpose(0, 1)
        return tiled.reshape(tiles, TILE, *rest).movedim(1, -1).contiguous()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held)


class PackedLinear:
    """A packed weight as `TiledLinear.apply` takes it.

    Attributes:
        n_out: columns of the result. nbytes: memory held. address: of the C struct.
        k: columns of x, of which up to `padding` may be missing: they are taken as zeros.
    """

    __slots__ = ("_struct", "_tiles", "address", "k", "n_out", "nbytes", "padding")

    def __init__(self, tiles: Tiles, struct: ctypes.Structure, k: int, *, padding: int = 0) -> None:
        self._tiles = tiles
        self._struct = struct
        self.address = ctypes.addressof(struct)
        self.k = k
        self.padding = padding
        self.n_out = tiles.n_out
        self.nbytes = tiles.nbytes


class TiledLinear:
    """``y = act(rms_norm(x) @ W^T + bias) + residual`` in one call of a C function.

    A row of the result has the same bits for any number of rows and threads. Calls are made on torch's own
    thread pool, with ``torch.get_num_threads()`` threads.
    """

    fuses: frozenset[str] = frozenset({"norm", "bias", "silu_mul", "residual"})
    FUNCTION: str
    """The C function, in csrc/cpu."""

    def __init__(self) -> None:
        self._linear: Callable[..., None] = getattr(cpu_library(), self.FUNCTION)

    def apply(
        self,
        x: Tensor,
        packed: PackedLinear,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """y = act(rms_norm(x) @ W^T + bias) + residual.

        Args:
            x: [M, K] bf16, last dimension contiguous, any row stride.
            packed: from ``pack``.
            norm: (weight [K] bf16 contiguous, eps) of an RMSNorm applied to x first.
            residual: [M, n_out] bf16, last dimension contiguous, added in fp32.
            out_dtype: bf16 (default) or fp32.
            out: [M, n_out] contiguous tensor of ``out_dtype`` to write instead of a new one.

        Returns:
            [M, n_out], rounded once from fp32.

        Raises:
            ValueError: a shape, type or stride does not fit.
        """
        rows, k = x.shape
        n_out = packed.n_out
        if not 0 <= packed.k - k <= packed.padding or x.dtype is not torch.bfloat16 or x.stride(1) != 1:
            raise ValueError(
                f"x must be [M, {packed.k}] bf16 with a contiguous last dimension, got "
                f"{tuple(x.shape)} {x.dtype} with strides {x.stride()}"
            )
        norm_weight, eps = None, 0.0
        if norm is not None:
            weight, eps = norm
            if weight.numel() != k or weight.dtype is not torch.bfloat16:
                raise ValueError(f"norm weight must be [{k}] bf16, got {tuple(weight.shape)}")
            norm_weight = weight.data_ptr()
        residual_address, residual_stride = None, 0
        if residual is not None:
            if (
                residual.shape != (rows, n_out)
                or residual.dtype is not torch.bfloat16
                or residual.stride(1) != 1
            ):
                raise ValueError(
                    f"residual must be [{rows}, {n_out}] bf16 with a contiguous last dimension, "
                    f"got {tuple(residual.shape)} {residual.dtype}"
                )
            residual_address, residual_stride = residual.data_ptr(), residual.stride(0)
        dtype = out_dtype or torch.bfloat16
        if dtype is not torch.bfloat16 and dtype is not torch.float32:
            raise ValueError(f"out_dtype must be bfloat16 or float32, got {dtype}")
        if out is None:
            out = torch.empty((rows, n_out), dtype=dtype)
        elif out.shape != (rows, n_out) or out.dtype is not dtype or not out.is_contiguous():
            raise ValueError(f"out must be a contiguous [{rows}, {n_out}] {dtype} tensor")
        self._linear(
            packed.address,
            x.data_ptr(),
            x.stride(0),
            rows,
            k,
            norm_weight,
            eps,
            residual_address,
            residual_stride,
            out.data_ptr(),
            dtype is torch.float32,
            torch.get_num_threads(),
        )
        return out


def check_cpu_matrix(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where `tensor` is no matrix of `dtype` on the CPU."""
    if tensor.dim() != 2 or tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be a 2-D {dtype} CPU tensor, got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


def check_names(tensors: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises ValueError where `tensors` holds what a kernel does not know, and would ignore."""
    if unknown := sorted(set(tensors) - set(known)):
        raise ValueError(f"tensors not known to this kernel: {', '.join(unknown)}; known: {', '.join(known)}")
