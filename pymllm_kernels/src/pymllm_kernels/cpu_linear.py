"""The CPU linear layer: y = act(rms_norm(x) @ W^T + bias) + residual."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from pymllm_core.nn.memory import zeros_on_demand
from pymllm_kernels.cpu_library import cpu_library

_TILE = 32  # output columns in a weight tile, kTileCols in csrc/cpu/linear.h
_ACTS: dict[str | None, int] = {None: 0, "silu_mul": 1}


class _PackedStruct(ctypes.Structure):
    """``PackedLinear`` of csrc/cpu/linear.h."""

    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("n_out", c_int64),
        ("k", c_int64),
        ("pairs", c_int64),
        ("tiles", c_int64),
        ("act", c_int64),
    ]


class PackedLinear:
    """A weight in the layout of the CPU kernels, on 2 MB pages; made by ``CpuLinear.pack``.

    Attributes:
        n_out: columns of the result (I for ``silu_mul`` over a weight of 2*I rows).
        k: columns of x.
        nbytes: memory held.
    """

    __slots__ = ("_bias", "_struct", "_weight", "address", "k", "n_out", "nbytes")

    def __init__(self, weight: Tensor, bias: Tensor | None, n_out: int, k: int, act: int) -> None:
        pairs = (k + 1) // 2
        self._weight = weight
        self._bias = bias
        self._struct = _PackedStruct(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            n_out,
            k,
            pairs,
            weight.numel() // (2 * _TILE * pairs),
            act,
        )
        self.address = ctypes.addressof(self._struct)
        self.n_out = n_out
        self.k = k
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)


class CpuLinear:
    """The operation ``linear`` for bf16 weights and activations on AVX512-BF16 CPUs.

    Sums are fp32, one chain per output in increasing k: a row of the result has the same bits
    for any number of rows and threads. Calls are made on torch's own thread pool, with
    ``torch.get_num_threads()`` threads.
    """

    fuses: frozenset[str] = frozenset({"norm", "bias", "silu_mul", "residual"})

    def __init__(self) -> None:
        library = cpu_library()
        self._pack = library.pymllm_linear_pack
        self._linear = library.pymllm_linear

    def pack(self, weight: Tensor, *, bias: Tensor | None = None, act: str | None = None) -> PackedLinear:
        """Copy a weight into the kernel's layout; the source may be freed afterwards.

        Args:
            weight: [N, K] bf16, last dimension contiguous. With ``act="silu_mul"`` its rows
                are [gate; up] and N = 2*I.
            bias: [N], any float type, or None.
            act: None or "silu_mul" (silu(gate) * up).

        Raises:
            ValueError: shape, type or activation not supported.
        """
        if act not in _ACTS:
            raise ValueError(f"act must be one of {list(_ACTS)}, got {act!r}")
        if weight.dim() != 2 or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            raise ValueError(
                f"weight must be a 2-D bf16 CPU tensor, got {tuple(weight.shape)} {weight.dtype} "
                f"on {weight.device}"
            )
        n, k = weight.shape
        if n == 0 or k == 0 or (act == "silu_mul" and n % 2):
            raise ValueError(f"weight of shape {(n, k)} cannot be packed with act={act!r}")
        if bias is not None and tuple(bias.shape) != (n,):
            raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        n_out = n // 2 if act == "silu_mul" else n
        columns = _TILE // 2 if act == "silu_mul" else _TILE
        tiles = -(-n_out // columns)
        packed = zeros_on_demand((tiles * ((k + 1) // 2) * _TILE * 2,), torch.bfloat16)
        self._pack(
            weight.data_ptr(),
            weight.stride(0),
            n_out,
            k,
            _ACTS[act],
            tiles,
            packed.data_ptr(),
            torch.get_num_threads(),
        )
        tiled_bias = None if bias is None else _tile_bias(bias, n_out, tiles, act)
        return PackedLinear(packed, tiled_bias, n_out, k, _ACTS[act])

    def apply(
        self,
        x: Tensor,
        packed: PackedLinear,
        *,
        norm: tuple[Tensor, float] | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """y = act(rms_norm(x) @ W^T + bias) + residual.

        Args:
            x: [M, K] bf16, last dimension contiguous, any row stride.
            packed: from :meth:`pack`.
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
        if k != packed.k or x.dtype is not torch.bfloat16 or x.stride(1) != 1:
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
            norm_weight,
            eps,
            residual_address,
            residual_stride,
            out.data_ptr(),
            dtype is torch.float32,
            torch.get_num_threads(),
        )
        return out


def _tile_bias(bias: Tensor, n_out: int, tiles: int, act: str | None) -> Tensor:
    """The bias as fp32 in the column order of the tiles, zero padded: [tiles * 32]."""
    if act != "silu_mul":
        return torch.nn.functional.pad(bias.float(), (0, tiles * _TILE - n_out)).contiguous()
    half = _TILE // 2
    gate_up = torch.zeros(2, tiles * half)
    gate_up[:, :n_out] = bias.float().view(2, n_out)
    return gate_up.view(2, tiles, half).transpose(0, 1).reshape(-1)
