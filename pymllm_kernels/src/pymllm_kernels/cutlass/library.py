"""From a tile to a compiled library."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import torch

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
    return Recipe(
        name=f"int8_gemm_{arch}_{tile.name}_{str(dtype).removeprefix('torch.')}",
        sources=(_SOURCES / tile.source,),
        flags=(
            *_FLAGS,
            f"-gencode=arch=compute_{number},code={arch}",
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
    return [recipe(tile, dtype, capability) for dtype in dtypes for _, tile in tiles_for(capability)]


@functools.cache
def int8_gemm_kernel(tile: Tile, dtype: torch.dtype, capability: Capability) -> Int8Gemm:
    """The loaded product. Raises KernelBuildError where it has to be compiled and cannot."""
    return Int8Gemm(load_library(recipe(tile, dtype, capability)), dtype)


def prepare(dtype: torch.dtype, capability: Capability) -> None:
    """Compile what the device lacks of its table, several at a time, before the first product waits for it."""
    build_all(recipes(capability, [dtype]))
