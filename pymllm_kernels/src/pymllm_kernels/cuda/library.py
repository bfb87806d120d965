"""How a library of one plain CUDA source is compiled, and what is said where it cannot be had or does not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pymllm_kernels.cutlass.tiles import Capability
from pymllm_kernels.cutlass.toolchain import arch_name, find_nvcc, nvcc_search_flags
from pymllm_kernels.jit import cache_entry, find_library
from pymllm_kernels.recipe import KernelBuildError, Recipe, Toolchain

_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"

_OLD_DRIVER = "; the driver is older than the CUDA release of the nvcc that compiled it"
_HINTS = {
    35: _OLD_DRIVER,  # cudaErrorInsufficientDriver
    209: "; it was compiled for another device",  # cudaErrorNoKernelImageForDevice
    222: _OLD_DRIVER,  # cudaErrorUnsupportedPtxVersion
}


def toolchain() -> Toolchain:
    """nvcc. Raises KernelBuildError where it is missing."""
    nvcc = find_nvcc()
    return Toolchain(str(nvcc), nvcc_search_flags(nvcc))


def cuda_recipe(
    name: str,
    source: str,
    variant: str,
    macros: Mapping[str, int],
    capability: Capability,
    *,
    seconds: int = 8,
) -> Recipe:
    """How `source` of csrc/cuda is compiled for a device. variant: what the macros choose, for the library's name."""
    arch = arch_name(capability)
    return Recipe(
        name=f"{name}_{arch}_{variant}",
        sources=(_SOURCES / source,),
        flags=(
            "-std=c++17",
            "-O3",
            "-DNDEBUG",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-Xptxas=-v",  # into compiler.log: registers and spills
            "--shared",
            # Its own copy of the runtime: torch's may be of another version of CUDA.
            "--cudart=static",
            f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}",
            *(f"-D{macro}={value}" for macro, value in macros.items()),
        ),
        toolchain=toolchain,
        arch=arch,
        seconds=seconds,
    )


def why_missing(recipes: Iterable[Recipe]) -> str | None:
    """Why one of the libraries cannot be had, None where each is compiled or can be."""
    for item in recipes:
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


def cuda_error(code: int) -> str:
    """What a number of cudaError_t means for a library that was compiled here."""
    return f"CUDA error {code}{_HINTS.get(code, '')} (cudaError_t)"
