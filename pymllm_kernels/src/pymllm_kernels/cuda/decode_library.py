"""The compiled decode attention: its recipe, and its C functions as Python calls them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from pymllm_core.errors import PymllmError
from pymllm_core.specs import Want
from pymllm_kernels.cutlass.tiles import Capability
from pymllm_kernels.cutlass.toolchain import arch_name, find_nvcc, nvcc_search_flags
from pymllm_kernels.jit import cache_entry, find_library, load_library
from pymllm_kernels.recipe import KernelBuildError, Recipe, Toolchain

_SOURCE = Path(__file__).parent.parent / "csrc" / "cuda" / "decode_attention.cu"

DTYPES = {torch.bfloat16: 0, torch.float16: 1}
"""The types of q and of the cache, as PYMLLM_HALF of csrc/cuda/warp.h numbers them."""

DIMS = (64, 128)
"""Sizes of a head."""

MAX_GROUP = 16
"""Query heads of a KV head at most."""

MAX_CLUSTER = 16
"""Blocks of a cluster at most, on Hopper (CUDA programming guide, "Thread Block Clusters")."""


class Arguments(ctypes.Structure):
    """``DecodeArguments`` of csrc/cuda/decode_attention.h."""

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
    hints = {
        35: "; the driver is older than the CUDA release of the nvcc that compiled it",
        209: "; it was compiled for another device",
        222: "; the driver is older than the CUDA release of the nvcc that compiled it",
    }
    if status:
        raise DecodeAttentionError(
            f"the decode attention failed to {what}: CUDA error {status}{hints.get(status, '')} (cudaError_t)"
        )


def toolchain() -> Toolchain:
    """nvcc. Raises KernelBuildError where it is missing."""
    nvcc = find_nvcc()
    return Toolchain(str(nvcc), nvcc_search_flags(nvcc))


def recipe(dim: int, dtype: torch.dtype, capability: Capability) -> Recipe:
    """How the library for one size of heads, dtype and device is compiled."""
    arch = arch_name(capability)
    number = arch.removeprefix("sm_")
    return Recipe(
        name=f"decode_attention_{arch}_{dim}_{str(dtype).removeprefix('torch.')}",
        sources=(_SOURCE,),
        flags=(
            "-std=c++17",
            "-O3",
            "-DNDEBUG",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-Xptxas=-v",  # into compiler.log: registers and spills
            "--shared",
            # Its own copy of the runtime: torch's may be of another version of CUDA.
            "--cudart=static",
            f"-gencode=arch=compute_{number},code={arch}",
            f"-DPYMLLM_DIM={dim}",
            f"-DPYMLLM_HALF={DTYPES[dtype]}",
        ),
        toolchain=toolchain,
        arch=arch,
        seconds=8,
    )


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
    item = recipe(want.shape["head_dim"], getattr(torch, want.dtype), capability)
    try:
        found = find_library(item)
    except KernelBuildError:
        return None  # a damaged bundle, which was meant to serve: loading says what is wrong with it
    if found is None:
        try:
            cache_entry(item)
        except KernelBuildError as error:
            return f"no bundle holds {item.name}, and it cannot be compiled: {error}"
    return None
