"""The int8 product as Python calls it: tensors are checked here, once, because CUDA would not."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int32, c_int64, c_size_t, c_void_p

import torch
from torch import Tensor

from pymllm_core.errors import PymllmError

OUT_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The types of D, as PYMLLM_OUT of csrc/cuda/int8_gemm.h numbers them."""

ALIGNMENT = 16
"""N and K must be multiples: rows are moved 16 bytes at a time."""

MAX_K = 1 << 16
"""Up to here int32 holds every sum: products of two codes are at most 2^14."""

_CUDA_ERROR = 1000
_OLD_DRIVER = "the driver is older than the CUDA release of the nvcc that compiled the library"
_CUDA_HINTS = {
    35: _OLD_DRIVER,  # cudaErrorInsufficientDriver
    209: "the library was compiled for another device",  # cudaErrorNoKernelImageForDevice
    222: _OLD_DRIVER,  # cudaErrorUnsupportedPtxVersion
}
_ERRORS = {
    1: "the shape is not supported by this tile",
    2: "the workspace is too small",
    3: "CUTLASS could not set up the launch",
}


class _Arguments(ctypes.Structure):
    """``Int8GemmArguments`` of csrc/cuda/int8_gemm.h."""

    _fields_ = [
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("a", c_void_p),
        ("b", c_void_p),
        ("a_scale", c_void_p),
        ("zero_point", c_void_p),
        ("b_scale", c_void_p),
        ("b_sum", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("d", c_void_p),
        ("per_row", c_int32),
        ("raster", c_int32),
        ("swizzle", c_int32),
    ]


class Int8GemmError(PymllmError, RuntimeError):
    """A product could not be launched; the message says which and why."""


class Int8Gemm:
    """One compiled tile and type of result.

    D = ((A · Bᵀ - zero_point · b_sum) · a_scale · b_scale + bias) + residual, where the bracket is exact and
    every float32 operation is rounded once, in this order: the bits of `nn.quant_ops.w8a8_epilogue`, then
    the residual, then one rounding to the result's type.
    """

    def __init__(self, library: ctypes.CDLL, out_dtype: torch.dtype) -> None:
        self.out_dtype = out_dtype
        self._launch = library.pymllm_int8_gemm
        self._launch.argtypes = [POINTER(_Arguments), c_void_p, c_size_t, c_void_p]
        self._launch.restype = c_int
        self._workspace_size = library.pymllm_int8_gemm_workspace_size
        self._workspace_size.argtypes = [POINTER(_Arguments)]
        self._workspace_size.restype = c_size_t

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        a_scale: Tensor,
        b_scale: Tensor,
        *,
        zero_point: Tensor | None = None,
        b_sum: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        raster: int = 0,
        swizzle: int = 1,
    ) -> Tensor:
        """Launch the product on the current stream.

        Args:
            a: [M, K] int8. b: [N, K] int8. Both contiguous, on one CUDA device.
            a_scale: [M], [M, 1] or one number, float32. b_scale: [N] float32.
            zero_point: int32, of a_scale's shape; with it b_sum [N] int32, the sums of b's rows.
            bias: [N] float32. residual: [M, N] of the result's type, columns contiguous.
            out: [M, N] contiguous, to be written instead of a new tensor.
            raster, swizzle: the order in which tiles are walked (csrc/cuda/int8_gemm.h).

        Returns:
            [M, N] in `out_dtype`.

        Raises:
            ValueError: a shape, type, stride or device does not fit.
            Int8GemmError: the launch failed.
        """
        (m, k), n = a.shape, b.shape[0]
        _expect("a", a, (m, k), torch.int8, a.device)
        _expect("b", b, (n, k), torch.int8, a.device)
        if n % ALIGNMENT or k % ALIGNMENT or not 0 < k <= MAX_K:
            raise ValueError(
                f"N and K must be multiples of {ALIGNMENT} and K at most {MAX_K}, got N={n}, K={k}"
            )
        per_row = a_scale.numel() != 1 or m == 1
        rows = m if per_row else 1
        _expect("a_scale", a_scale.reshape(-1), (rows,), torch.float32, a.device)
        _expect("b_scale", b_scale, (n,), torch.float32, a.device)
        if (zero_point is None) != (b_sum is None):
            raise ValueError("zero_point and b_sum belong together: give both or none")
        if zero_point is not None and b_sum is not None:
            _expect("zero_point", zero_point.reshape(-1), (rows,), torch.int32, a.device)
            _expect("b_sum", b_sum, (n,), torch.int32, a.device)
        if bias is not None:
            _expect("bias", bias, (n,), torch.float32, a.device)
        if residual is not None and (
            residual.shape != (m, n)
            or residual.dtype != self.out_dtype
            or residual.stride(1) != 1
            or residual.stride(0) * residual.element_size() % ALIGNMENT
            or residual.data_ptr() % ALIGNMENT
            or residual.device != a.device
        ):
            raise ValueError(
                f"residual must be [{m}, {n}] {self.out_dtype} on {a.device}, columns contiguous and rows at "
                f"multiples of {ALIGNMENT} bytes; got {tuple(residual.shape)} {residual.dtype} on "
                f"{residual.device} with strides {residual.stride()}"
            )
        if out is None:
            out = torch.empty((m, n), dtype=self.out_dtype, device=a.device)
        else:
            _expect("out", out, (m, n), self.out_dtype, a.device)
        if m == 0:
            return out
        arguments = _Arguments(
            m=m,
            n=n,
            k=k,
            a=a.data_ptr(),
            b=b.data_ptr(),
            a_scale=a_scale.data_ptr(),
            zero_point=None if zero_point is None else zero_point.data_ptr(),
            b_scale=b_scale.data_ptr(),
            b_sum=None if b_sum is None else b_sum.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            residual=None if residual is None else residual.data_ptr(),
            residual_stride=n if residual is None else residual.stride(0),
            d=out.data_ptr(),
            per_row=per_row,
            raster=raster,
            swizzle=swizzle,
        )
        with torch.cuda.device(a.device):
            size = self._workspace_size(byref(arguments))
            workspace = torch.empty(size, dtype=torch.uint8, device=a.device) if size else None
            stream = torch.cuda.current_stream(a.device).cuda_stream
            address = None if workspace is None else workspace.data_ptr()
            status = self._launch(byref(arguments), address, size, stream)
        if status:
            raise Int8GemmError(f"int8 product of M={m}, N={n}, K={k} failed: {_reason(status)}")
        return out


def _reason(status: int) -> str:
    if status > _CUDA_ERROR:
        code = status - _CUDA_ERROR
        return f"CUDA error {code}: " + _CUDA_HINTS.get(code, "see cudaError_t in cuda_runtime_api.h")
    return _ERRORS.get(status, f"unknown status {status}")


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if (
        tensor.shape != shape
        or tensor.dtype != dtype
        or not tensor.is_contiguous()
        or tensor.device != device
        or (tensor.data_ptr() % ALIGNMENT and dtype == torch.int8)
    ):
        raise ValueError(
            f"{name} must be {list(shape)} {dtype} on {device}, contiguous; got {tuple(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )
