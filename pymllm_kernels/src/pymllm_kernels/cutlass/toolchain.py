"""The CUDA compiler and the CUTLASS headers of this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
from collections.abc import Iterator
from pathlib import Path

from pymllm_kernels.recipe import KernelBuildError, Toolchain, digest_of

CUTLASS_ENV = "CUTLASS_HOME"
_PROBE = "cutlass/cutlass.h"
_VERSION = "cutlass/version.h"
SYSTEM_CUDA = Path("/usr/local/cuda")
SYSTEM_INCLUDES = (Path("/usr/local/include"), Path("/usr/include"), SYSTEM_CUDA / "include")
_MIN_CUTLASS = (3, 5)
"""Epilogue visitor trees with per-row and per-column numbers for both generations."""


def arch_name(capability: tuple[int, int]) -> str:
    """nvcc's name of a device: sm_90a for Hopper, whose own instructions need the "a"."""
    major, minor = capability
    return f"sm_{major}{minor}a" if capability == (9, 0) else f"sm_{major}{minor}"


def nvcc_candidates() -> Iterator[Path]:
    """Where nvcc may be: $CUDACXX, $CUDA_HOME, the PATH, /usr/local/cuda, NVIDIA's wheels."""
    if named := os.environ.get("CUDACXX"):
        yield Path(shutil.which(named) or named)
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield SYSTEM_CUDA / "bin" / "nvcc"
    for folder in dict.fromkeys([*site.getsitepackages(), site.getusersitepackages()]):
        # pip install nvidia-cuda-nvcc: nvidia/cu13/bin
        yield from sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)


def find_nvcc() -> Path:
    """The first nvcc that is there. Raises KernelBuildError with what to install."""
    tried = list(nvcc_candidates())
    for path in tried:
        if path.is_file():
            return path
    raise KernelBuildError(
        "no CUDA compiler found to build the kernels; looked for "
        + ", ".join(map(str, tried))
        + "; install the CUDA toolkit, or pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or name nvcc in "
        "CUDACXX. For a device without a compiler, build a bundle elsewhere: pymllm kernels build --help"
    )


def package_folder(name: str) -> Path | None:
    """The folder of an installed package, which is not imported; None where it is not installed."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


def cutlass_candidates() -> Iterator[Path]:
    """Folders with headers in the order in which they are searched; the last wheel is nvidia-cutlass."""
    if home := os.environ.get(CUTLASS_ENV):
        yield Path(home) / "include"
    if folder := package_folder("flashinfer"):
        yield folder / "data" / "cutlass" / "include"
    if folder := package_folder("cutlass_library"):
        yield folder / "source" / "include"
    yield from SYSTEM_INCLUDES


def find_cutlass() -> Path:
    """The first folder that holds CUTLASS's headers. Raises KernelBuildError with what to install."""
    tried = list(cutlass_candidates())
    if (home := os.environ.get(CUTLASS_ENV)) and not (tried[0] / _PROBE).is_file():
        # Asked for by name: nothing else is taken in its place.
        raise KernelBuildError(f"{CUTLASS_ENV}={home} holds no CUTLASS: there is no {tried[0] / _PROBE}")
    for folder in tried:
        if (folder / _PROBE).is_file():
            return folder
    raise KernelBuildError(
        "no CUTLASS headers found; looked in "
        + ", ".join(map(str, tried))
        + f"; pip install flashinfer-python, which holds them, or clone https://github.com/NVIDIA/cutlass and set "
        f"{CUTLASS_ENV} to it"
    )


def cutlass_version(include: Path) -> tuple[int, int]:
    """(major, minor). Raises KernelBuildError where the headers say none."""
    text = (include / _VERSION).read_text() if (include / _VERSION).is_file() else ""
    found = {name: int(value) for name, value in re.findall(r"define CUTLASS_(MAJOR|MINOR) (\d+)", text)}
    if found.keys() != {"MAJOR", "MINOR"}:
        raise KernelBuildError(f"{include / _VERSION} says no version of CUTLASS; is the copy whole?")
    return found["MAJOR"], found["MINOR"]


def nvcc_search_flags(nvcc: Path) -> tuple[str, ...]:
    """NVIDIA's wheels put headers and libraries where their nvcc does not look."""
    root = nvcc.resolve().parent.parent
    if root.parent.name != "nvidia":
        return ()
    return (f"-I{root / 'include'}", f"-I{root / 'include' / 'cccl'}", f"-L{root / 'lib'}")


def cutlass_toolchain() -> Toolchain:
    """nvcc with the headers of CUTLASS. Raises KernelBuildError where either is missing or too old."""
    nvcc, include = find_nvcc(), find_cutlass()
    version = cutlass_version(include)
    if version < _MIN_CUTLASS:
        raise KernelBuildError(
            f"CUTLASS {version[0]}.{version[1]} in {include} is older than "
            f"{_MIN_CUTLASS[0]}.{_MIN_CUTLASS[1]}; set {CUTLASS_ENV} to a newer one"
        )
    # Beside the headers in the repository and in FlashInfer's copy.
    utilities = include.parent / "tools" / "util" / "include"
    folders = [include, *([utilities] if utilities.is_dir() else [])]
    return Toolchain(
        str(nvcc),
        (*(f"-I{folder}" for folder in folders), *nvcc_search_flags(nvcc)),
        (digest_of((include / _VERSION).read_bytes()),),
    )
