"""The compiled decode attention: its recipe, and its C functions as Python calls them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_void_p

import torch

from pymllm_core.errors import PymllmError
from pymllm_core.specs import Want
from pymllm_kernels.cuda.library import cuda_error, cuda_recipe, why_missing
from pymllm_kernels.cutlass.tiles import Capability
from pymllm_kernels.jit import load_library
from pymllm_kernels.recipe import Recipe

DTYPES = {torch.bfloat16: 0, torch.float16: 1}
"""The types of q and of the cache, as PYMLLM_HALF of csrc/cuda/warp.h numbers them."""

DIMS = (64, 128)
"""Sizes of a head."""

MAX_GROUP = 16
"""Query heads of a KV head at most."""

TILE = 16
"""Tokens of the cache that a warp takes at a time."""


def shared_bytes(dim: int, warps: int, cluster: int = 1, group: int = MAX_GROUP) -> int:
    """Bytes of shared memory that a block takes (csrc/cuda/decode_meet.h)."""
    return warps * (128 * dim + 128) + 16 + (cluster - 1) * group * (dim + 2) * 4


class Arguments(ctypes.Structure):
    """``DecodeArguments`` of csrc/cuda/decode_arguments.h."""

    _fields_ = [
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("positions", c_void_p),
        ("cos_sin", c_void_p),
        ("q_weight", c_void_p),
        ("k_weight", c_void_p),
        ("slots", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("cache_stride", c_int64),
        ("out", c_void_p),
        ("page_table", c_void_p),
        ("table_stride", c_int64),
        ("kv_lens", c_void_p),
        ("partial", c_void_p),
        ("stats", c_void_p),
        ("counters", c_void_p),
        ("scale", c_float),
        ("eps", c_float),
        ("batch", c_int32),
        ("kv_heads", c_int32),
        ("group", c_int32),
        ("page_shift", c_int32),
        ("splits_shift", c_int32),
        ("least", c_int32),
        ("prepare", c_int32),
        ("cluster_shift", c_int32),
        ("pdl", c_int32),
        ("warps", c_int32),
    ]


class DecodeAttentionError(PymllmError, RuntimeError):
    """The kernel could not be launched; the message says why."""


class DecodeLibrary:
    """The compiled kernels of one size of heads and one dtype, ready on the current device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._launch = library.pymllm_decode_attention
        self._launch.argtypes = [POINTER(Arguments), c_void_p]
        self._launch.restype = c_int
        # CUDA would load the kernels at their first launch, which may be a capture.
        _expect_success("set up", library.pymllm_decode_attention_set_up())

    def __call__(self, arguments: Arguments, stream: int | None) -> None:
        """Launch on a stream of the current device. Raises DecodeAttentionError where CUDA refuses."""
        _expect_success("launch", self._launch(byref(arguments), stream))


def _expect_success(what: str, status: int) -> None:
    if status:
        raise DecodeAttentionError(f"the decode attention failed to {what}: {cuda_error(status)}")


def recipe(dim: int, dtype: torch.dtype, capability: Capability) -> Recipe:
    """How the library for one size of heads, dtype and device is compiled."""
    variant = f"{dim}_{str(dtype).removeprefix('torch.')}"
    macros = {"PYMLLM_DIM": dim, "PYMLLM_HALF": DTYPES[dtype]}
    return cuda_recipe("decode_attention", "decode_attention.cu", variant, macros, capability)


def recipes(capability: Capability, dtypes: Iterable[torch.dtype]) -> list[Recipe]:
    """Every library that a device may ask for; none for a dtype without one."""
    return [recipe(dim, dtype, capability) for dtype in dtypes if dtype in DTYPES for dim in DIMS]


@functools.cache
def decode_library(dim: int, dtype: torch.dtype, device: torch.device) -> DecodeLibrary:
    """The kernels, ready on a device.

    Raises KernelBuildError where they have to be compiled and cannot, DecodeAttentionError where they cannot run.
    """
    library = load_library(recipe(dim, dtype, torch.cuda.get_device_capability(device)))
    with torch.cuda.device(device):
        return DecodeLibrary(library)


def why_not(want: Want) -> str | None:
    """Why no kernel can be had for this situation, None where it is compiled or can be: a `Needs.check`."""
    capability = want.device.capability
    assert capability is not None
    return why_missing([recipe(want.shape["head_dim"], getattr(torch, want.dtype), capability)])
