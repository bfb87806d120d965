"""The compile cache: native sources in, a shared library on disk out.

A library lies in ``<cache>/<name>/<key>/`` next to a checksum of its bytes. The key covers all
that can change the result: sources and the headers beside them, compiler, flags, torch, the machine and what
the recipe adds. Entries are built in a temporary folder and renamed into place under a file lock, so that
several processes can share one cache. A library that a bundle holds (`bundle.py`) needs no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from filelock import FileLock

from pymllm_kernels.bundle import prebuilt_library
from pymllm_kernels.recipe import CACHE_ENV, KernelBuildError, Recipe, cache_root, digest_of, sha256

logger = logging.getLogger(__name__)

_ERROR_LINES = 20


def find_library(recipe: Recipe) -> Path | None:
    """The library where a bundle or the cache holds it intact, else None. Compiles nothing."""
    library = prebuilt_library(recipe)
    if library is not None:
        return library
    try:
        library = cache_entry(recipe) / f"lib{recipe.name}.so"
    except KernelBuildError:  # no compiler, so nothing that it can have made
        return None
    return library if is_intact(library) else None


def build_library(recipe: Recipe, *, anew: bool = False) -> Path:
    """Compile the recipe's library, or find it in a bundle or in the cache.

    A cache entry that is incomplete or whose bytes do not match its checksum is built anew; with `anew`,
    every one is, and bundles are passed over.

    Raises:
        KernelBuildError: the compiler is missing or fails, or the cache cannot be written.
    """
    found = None if anew else find_library(recipe)
    if found is not None:
        return found
    entry = cache_entry(recipe)
    library = entry / f"lib{recipe.name}.so"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(entry) + ".lock"):
            if anew or not is_intact(library):  # another process may have built it meanwhile
                shutil.rmtree(entry, ignore_errors=True)
                _build(recipe, entry)
    except OSError as error:
        raise KernelBuildError(
            f"cannot write the kernel cache {entry.parent}: {error}; set {CACHE_ENV} to a writable folder"
        ) from error
    return library


def load_library(recipe: Recipe) -> ctypes.CDLL:
    """Build (or find) a library and load it; one that does not load is built anew once.

    Raises:
        KernelBuildError: as :func:`build_library`, or a fresh build does not load.
    """
    path = build_library(recipe)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("kernels %s do not load (%s); compiling them anew", path, error)
        why = error
    try:
        path = build_library(recipe, anew=True)
    except KernelBuildError as error:
        raise KernelBuildError(
            f"{path} does not load ({why}), and it cannot be compiled anew: {error}"
        ) from why
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"the compiled {recipe.name} kernels do not load: {error}") from error


def cache_entry(recipe: Recipe) -> Path:
    """The recipe's folder in the cache. Raises KernelBuildError where its toolchain is not there."""
    tools = recipe.toolchain()
    compiler = compiler_path(tools.compiler, recipe.name)
    key = digest_of(
        recipe.source_key(), os.path.realpath(compiler), compiler_version(compiler), *tools.identity,
        torch.__version__,
    )  # fmt: skip
    return cache_root() / recipe.name / key


def compiler_path(compiler: str, name: str) -> str:
    """The compiler's full path. Raises KernelBuildError with what to install."""
    path = shutil.which(compiler)
    if path is None:
        raise KernelBuildError(
            f"no compiler {compiler!r} found to build the {name} kernels; "
            "install one (Debian/Ubuntu: apt install g++, Fedora: dnf install gcc-c++) "
            "or name it in the CXX environment variable"
        )
    return path


@functools.lru_cache(maxsize=8)
def compiler_version(path: str) -> str:
    """What ``compiler --version`` prints."""
    try:
        return subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(f"cannot run the compiler {path}: {error}") from error


def checksum_file(library: Path) -> Path:
    """The file beside a library that holds the checksum of its bytes."""
    return library.with_name(library.name + ".sha256")


def is_intact(library: Path) -> bool:
    """Whether a cache entry is complete and unchanged."""
    try:
        return sha256(library) == checksum_file(library).read_text()
    except OSError:
        return False


def _build(recipe: Recipe, entry: Path) -> None:
    """Compile into a temporary folder beside ``entry`` and rename it to ``entry``."""
    tools = recipe.toolchain()
    compiler = compiler_path(tools.compiler, recipe.name)
    logger.info("compiling %s kernels (first use, about %d s)", recipe.name, recipe.seconds)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}-") as scratch:
        folder = Path(scratch) / "entry"
        folder.mkdir()
        library = folder / f"lib{recipe.name}.so"
        command = [compiler, *map(str, recipe.sources), *recipe.flags, *tools.search, "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0 or not library.exists():
            output = (result.stderr or result.stdout).strip().splitlines()
            killed = " (killed: out of memory?)" if result.returncode in (-9, 137) else ""
            raise KernelBuildError(
                f"{compiler} failed (exit status {result.returncode}{killed}) on the {recipe.name} kernels:\n"
                + "\n".join(output[-_ERROR_LINES:])
                + f"\ncommand: {' '.join(command)}"
            )
        # What the compiler says about registers and shared memory, where the flags ask for it.
        (folder / "compiler.log").write_text(result.stdout + result.stderr)
        checksum_file(library).write_text(sha256(library))
        folder.rename(entry)
    logger.info("compiled %s kernels in %.0f s", recipe.name, time.monotonic() - started)
