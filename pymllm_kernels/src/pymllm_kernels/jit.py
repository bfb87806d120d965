"""The compile cache: native sources in, a shared library on disk out.

A library lies in ``<cache>/<name>/<key>/`` next to a checksum of its bytes. The key covers all
that can change the result: sources and the headers beside them, compiler, flags, torch and the
machine architecture. Entries are built in a temporary folder and renamed into place under a
file lock, so that several processes can share one cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

CACHE_ENV = "PYMLLM_KERNELS_CACHE"

_HEADER_SUFFIXES = {".h", ".hpp", ".cuh"}
_ERROR_LINES = 20


class KernelBuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do."""


def cache_root() -> Path:
    """The folder that holds all compiled libraries."""
    override = os.environ.get(CACHE_ENV)
    return Path(override) if override else Path.home() / ".cache" / "pymllm_kernels"


def build_shared_library(
    name: str,
    sources: Sequence[Path],
    compiler: str,
    flags: Sequence[str],
    *,
    expected_seconds: int = 8,
) -> Path:
    """Compile ``sources`` into one shared library, or find it in the cache.

    The command is ``compiler sources... flags... -o library``; ``flags`` must ask for a shared
    library. A cache entry that is incomplete or whose bytes do not match its checksum is built
    anew. ``expected_seconds`` is only used in the progress message.

    Raises:
        KernelBuildError: the compiler is missing or fails, or the cache cannot be written.
    """
    compiler_path = shutil.which(compiler)
    if compiler_path is None:
        raise KernelBuildError(
            f"no compiler {compiler!r} found to build the {name} kernels; "
            "install one (Debian/Ubuntu: apt install g++, Fedora: dnf install gcc-c++) "
            "or name it in the CXX environment variable"
        )
    key = _cache_key(sources, compiler_path, flags)
    entry = cache_root() / name / key
    library = entry / f"lib{name}.so"
    if _is_intact(library):
        return library
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(entry) + ".lock"):
            if not _is_intact(library):  # another process may have built it meanwhile
                shutil.rmtree(entry, ignore_errors=True)
                _build(name, sources, compiler_path, flags, entry, expected_seconds)
    except OSError as error:
        raise KernelBuildError(
            f"cannot write the kernel cache {entry.parent}: {error}; set {CACHE_ENV} to a writable folder"
        ) from error
    return library


def load_shared_library(
    name: str,
    sources: Sequence[Path],
    compiler: str,
    flags: Sequence[str],
    *,
    expected_seconds: int = 8,
) -> ctypes.CDLL:
    """Build (or find) a library and load it; one that does not load is built anew once.

    Raises:
        KernelBuildError: as :func:`build_shared_library`, or a fresh build does not load.
    """
    path = build_shared_library(name, sources, compiler, flags, expected_seconds=expected_seconds)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("cached kernels %s do not load (%s); compiling them anew", path, error)
    shutil.rmtree(path.parent, ignore_errors=True)
    path = build_shared_library(name, sources, compiler, flags, expected_seconds=expected_seconds)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"the compiled {name} kernels do not load: {error}") from error


def _cache_key(sources: Sequence[Path], compiler_path: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

    folders = {source.parent for source in sources}
    headers = [h for f in folders for h in f.iterdir() if h.suffix in _HEADER_SUFFIXES]
    for path in [*sources, *sorted(headers)]:
        add(path.name, path.read_bytes())
    add(os.path.realpath(compiler_path), _compiler_version(compiler_path))
    add(*flags)
    add(torch.__version__, platform.machine(), platform.system())
    return digest.hexdigest()[:24]


def _compiler_version(compiler_path: str) -> str:
    try:
        return subprocess.run(
            [compiler_path, "--version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(f"cannot run the compiler {compiler_path}: {error}") from error


def _checksum_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _is_intact(library: Path) -> bool:
    try:
        expected = _checksum_file(library).read_text()
        return hashlib.sha256(library.read_bytes()).hexdigest() == expected
    except OSError:
        return False


def _build(
    name: str,
    sources: Sequence[Path],
    compiler_path: str,
    flags: Sequence[str],
    entry: Path,
    expected_seconds: int,
) -> None:
    """Compile into a temporary folder beside ``entry`` and rename it to ``entry``."""
    logger.info("compiling %s kernels (first use, about %d s)", name, expected_seconds)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}-") as scratch:
        folder = Path(scratch) / "entry"
        folder.mkdir()
        library = folder / f"lib{name}.so"
        command = [compiler_path, *map(str, sources), *flags, "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0 or not library.exists():
            output = (result.stderr or result.stdout).strip().splitlines()
            raise KernelBuildError(
                f"{compiler_path} failed (exit status {result.returncode}) on the {name} kernels:\n"
                + "\n".join(output[-_ERROR_LINES:])
                + f"\ncommand: {' '.join(command)}"
            )
        _checksum_file(library).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        folder.rename(entry)
    logger.info("compiled %s kernels in %.0f s", name, time.monotonic() - started)
