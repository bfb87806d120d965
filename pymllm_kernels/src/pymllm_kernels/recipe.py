"""What a compiled library is made of, and with what: plain data that cache, bundles and commands share."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pymllm_core.errors import PymllmError

CACHE_ENV = "PYMLLM_KERNELS_CACHE"

_HEADER_SUFFIXES = {".h", ".hpp", ".cuh"}


class KernelBuildError(PymllmError, RuntimeError):
    """The kernels could not be compiled; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiles on this machine.

    compiler: a program's name or path. search: flags that name folders of this machine; not part of the
    key. identity: versions of what those folders hold; part of it.
    """

    compiler: str
    search: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one library is compiled: ``compiler sources... flags... search... -o library``.

    flags: must ask for a shared library. toolchain: found only where something is compiled; raises
    KernelBuildError where it is not there. arch: what the library runs on, e.g. ``sm_87``. seconds: a guess
    for the progress message. memory: bytes that the compiler needs.
    """

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    toolchain: Callable[[], Toolchain]
    arch: str
    seconds: int = 8
    memory: int = 1 << 29

    def source_key(self) -> str:
        """What the library is made of: sources, the headers beside them, flags, the machine's processor."""
        folders = {source.parent for source in self.sources}
        headers = [h for f in folders for h in f.iterdir() if h.suffix in _HEADER_SUFFIXES]
        files = [*self.sources, *sorted(headers)]
        parts: list[str | bytes] = [part for path in files for part in (path.name, path.read_bytes())]
        return digest_of(*parts, *self.flags, self.arch, platform.machine(), platform.system())


def cache_root() -> Path:
    """The folder that holds all compiled libraries."""
    override = os.environ.get(CACHE_ENV)
    return Path(override) if override else Path.home() / ".cache" / "pymllm_kernels"


def digest_of(*parts: str | bytes) -> str:
    """A short digest of the parts, each kept apart from the next."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:24]


def sha256(path: Path) -> str:
    """The checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
