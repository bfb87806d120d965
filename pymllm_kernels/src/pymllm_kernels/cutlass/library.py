"""From a tile to a compiled library."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import torch

from pymllm_core.specs import Want
from pymllm_kernels.cuda.library import why_missing
from pymllm_kernels.cutlass.gemm import OUT_DTYPES, Int8Gemm
from pymllm_kernels.cutlass.tiles import Capability, Tile, tiles_for
from pymllm_kernels.cutlass.toolchain import arch_name, cutlass_toolchain
from pymllm_kernels.jit import load_library
from pymllm_kernels.parallel import build_all
from pymllm_kernels.recipe import Recipe

_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
_MEMORY = 4 << 30
"""nvcc 13.0 peaks at 3.9 GB on the Hopper product."""

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    # CUTLASS marks defaulted constructors for the device, which nvcc remarks on.
    "-diag-suppress=20012",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",  # into compiler.log: registers and spills
    "--shared",
    # Its own copy of the runtime: torch's may be of another version of CUDA.
    "--cudart=static",
)


def recipe(tile: Tile, dtype: torch.dtype, capability: Capability) -> Recipe:
    """How the library of one tile, type of result and device is compiled."""
    arch = arch_name(capability)
    number = arch.removeprefix("sm_")
    # PTX beside the machine code lets a later device run SM80's product; Hopper's own is for nothing else.
    code = arch if capability == (9, 0) else f"[{arch},compute_{number}]"
    return Recipe(
        name=f"int8_gemm_{arch}_{tile.name}_{str(dtype).removeprefix('torch.')}",
        sources=(_SOURCES / tile.source,),
        flags=(
            *_FLAGS,
            f"-gencode=arch=compute_{number},code={code}",
            f"-DPYMLLM_OUT={OUT_DTYPES[dtype]}",
            *(f"-D{name}={value}" for name, value in tile.macros.items()),
        ),
        toolchain=cutlass_toolchain,
        arch=arch,
        seconds=50 if capability == (9, 0) else 25,
        memory=_MEMORY,
    )


def recipes(capability: Capability, dtypes: Iterable[torch.dtype]) -> list[Recipe]:
    """Every library that a device may ask for. Raises ValueError for a device without tiles."""
    return [recipe(tile, dtype, capability) for dtype in dtypes for tile, _ in tiles_for(capability)]


@functools.cache
def int8_gemm_kernel(tile: Tile, dtype: torch.dtype, capability: Capability) -> Int8Gemm:
    """The loaded product. Raises KernelBuildError where it has to be compiled and cannot."""
    return Int8Gemm(load_library(recipe(tile, dtype, capability)), dtype)


def load_gemms(dtype: torch.dtype, capability: Capability) -> dict[Tile, Int8Gemm]:
    """The products of all tiles of a device; what is missing is compiled first, several at a time.

    Raises KernelBuildError where something has to be compiled and cannot.
    """
    build_all(recipes(capability, [dtype]))
    return {tile: int8_gemm_kernel(tile, dtype, capability) for tile, _ in tiles_for(capability)}


def why_not(want: Want) -> str | None:
    """Why no product can be had for this situation, None where it is compiled or can be: a `Needs.check`."""
    capability = want.device.capability
    assert capability is not None
    return why_not_here(capability, want.dtype)


@functools.cache  # asked for every linear of a model
def why_not_here(capability: Capability, dtype: str) -> str | None:
    """Why no product can be had for a device and a dtype, None where it is compiled or can be."""
    return why_missing(recipes(capability, [getattr(torch, dtype)]))
