"""The compiled CPU library and the C signatures of its functions."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shutil
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from pymllm_kernels.jit import load_library
from pymllm_kernels.recipe import Recipe, Toolchain

#: /proc/cpuinfo flags without which the kernels must not be called.
REQUIRED_CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"})

_SOURCES = Path(__file__).parent / "csrc" / "cpu"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512bf16",
    "-mavx512vnni",
    "-mavx2",
    "-mprfchw",
    "-mfma",
    # Contraction chosen by the compiler could differ between two instances of one template,
    # and with it the bits of a row between batch sizes.
    "-ffp-contract=off",
    "-fno-strict-aliasing",
)

_LINEAR: list[type] = [
    *[c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_float],
    *[c_void_p, c_int64, c_void_p, c_int, c_int],
]
_SIGNATURES: dict[str, list[type]] = {
    "pymllm_linear_pack": [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int],
    "pymllm_linear": _LINEAR,
    "pymllm_w8a8_linear": _LINEAR,
    "pymllm_weight_only_linear": _LINEAR,
    "pymllm_qk_norm_rope_write": [
        *[c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_float],
        *[c_void_p, c_void_p, c_void_p, c_void_p],
        *[c_int64, c_int64, c_int64, c_int64, c_int],
    ],
    "pymllm_paged_attention": [
        *[c_void_p] * 7,
        *[c_int64] * 6,
        *[c_float, c_int],
    ],
}


def default_compiler() -> str:
    """``$CXX``, else the first of g++, c++ and clang++ that is installed."""
    named = os.environ.get("CXX")
    if named:
        return named
    return next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), "g++")


def openmp_link_flags() -> list[str]:
    """Linker flags that bind the library to the OpenMP runtime torch has already loaded.

    A second runtime would bring a second thread pool whose idle threads spin against torch's.
    """
    for path in _mapped_openmp_runtimes():
        return [str(path), f"-Wl,-rpath,{path.parent}"]
    return ["-lgomp"]


def _mapped_openmp_runtimes() -> list[Path]:
    """OpenMP runtimes in this process, those that came with torch first."""
    pattern = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.so[^/]*$")
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(line.split(maxsplit=5)[5]) for line in lines if pattern.search(line)}
    packages = Path(torch.__file__).resolve().parents[1]
    return sorted(mapped, key=lambda p: (packages not in p.parents, str(p)))


def cpu_recipe() -> Recipe:
    """How the library of this machine's CPU is compiled."""
    return Recipe(
        name="pymllm_cpu",
        sources=tuple(sorted(_SOURCES.glob("*.cpp"))),
        flags=(*_FLAGS, *openmp_link_flags()),
        toolchain=lambda: Toolchain(default_compiler()),
        arch=platform.machine(),
    )


@functools.cache
def cpu_library() -> ctypes.CDLL:
    """The loaded library, compiled first where the cache lacks it.

    Raises:
        pymllm_kernels.recipe.KernelBuildError: no compiler, or it fails.
    """
    library = load_library(cpu_recipe())
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library
