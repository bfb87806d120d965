"""A model folder on disk: its config and its safetensors, read lazily and checked before use."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pymllm_core.engine.headers import scan
from pymllm_core.errors import CheckpointError
from pymllm_core.protocols.lint import StoredTensor
from pymllm_core.protocols.quant import WeightSlot


@dataclass(frozen=True, slots=True)
class Mismatches:
    """Where a checkpoint's headers and a model's slots differ.

    missing: slots that are not optional. shapes: slots whose tensor has another shape. unused: stored names
    that no slot asks for.
    """

    missing: list[WeightSlot]
    shapes: list[WeightSlot]
    unused: list[str]


def compare(
    slots: Iterable[WeightSlot], stored: Mapping[str, tuple[int, ...]], ignored: Set[str]
) -> Mismatches:
    """What loading would refuse, by names and shapes."""
    wanted = {slot.name: slot for slot in slots}
    return Mismatches(
        [slot for name, slot in wanted.items() if name not in stored and not slot.optional],
        [slot for name, slot in wanted.items() if name in stored and stored[name] != slot.shape],
        sorted(stored.keys() - wanted.keys() - ignored),
    )


class Checkpoint:
    """The tensors of a folder's safetensors. Opening reads headers only; tensors are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._read: list[Tensor] = []
        self._mapped: dict[Path, bool] = {}
        found = scan(folder)
        if found.problems:
            raise CheckpointError(found.problems[0].message)
        self._stored: dict[str, StoredTensor] = found.tensors

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{file} ({file.stat().st_size:,} bytes) is no whole safetensors file: {error}; "
                    "download it again"
                ) from error
        return self._open[file]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors."""
        return {name: stored.shape for name, stored in self._stored.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtypes of all tensors, as the format of safetensors spells them: ``BF16``, ``I32``."""
        return {name: stored.dtype for name, stored in self._stored.items()}

    def check(self, slots: list[WeightSlot], ignored: set[str]) -> None:
        """Compare headers with what the model needs, before any tensor is read.

        Raises CheckpointError that names every missing, mis-shaped and unused tensor (the first ten each).
        """
        found = compare(slots, self.shapes, ignored)
        missing = [slot.name for slot in found.missing]
        shapes = [
            f"{slot.name} is {list(self._stored[slot.name].shape)}, expected {list(slot.shape)}"
            for slot in found.shapes
        ]
        problems = [
            f"{title}: {_some(names)}"
            for title, names in (
                ("missing", missing),
                ("wrong shape", shapes),
                ("not used by the model", found.unused),
            )
            if names
        ]
        if problems:
            raise CheckpointError(f"{self.folder} does not fit its config.json. " + ". ".join(problems))

    def read(self, slot: WeightSlot) -> Tensor | None:
        """A tensor as stored, memory-mapped; None for an absent optional one."""
        if slot.name not in self._stored:
            return None
        tensor = self._tensor(slot.name)
        if not slot.accepts(tensor.dtype):
            raise CheckpointError(
                f"tensor {slot.name!r} of {self._stored[slot.name].file} is {tensor.dtype}, expected {slot.dtype}; "
                "is it quantised by a method that config.json does not name?"
            )
        return tensor

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """The tensor `name` as stored, `count` rows (entries of its first dimension) at a time.

        The memory of what was handed out is let go before the next rows; a scalar comes whole.
        """
        tensor = self._tensor(name)
        for part in tensor.split(count) if tensor.ndim else (tensor,):
            yield part
            if self._mapped[self._stored[name].file]:
                _let_go(tensor)
        self.release()

    def _tensor(self, name: str) -> Tensor:
        stored = self._stored[name]
        try:
            tensor = self._handle(stored.file).get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"tensor {name!r} of {stored.file} cannot be read: {error}") from error
        assert isinstance(tensor, Tensor)
        if stored.file not in self._mapped:
            self._mapped[stored.file] = _lies_in_file(tensor)
        if self._mapped[stored.file]:
            self._read.append(tensor)
        return tensor

    def release(self) -> None:
        """Let the kernel take back the memory of what was read: it has been copied, or will be read again.

        Mapped pages stay resident otherwise, and loading would look (and on a small device be) twice the model.
        """
        for tensor in self._read:
            _let_go(tensor)
        self._read.clear()

    def close(self) -> None:
        """Let go of the files; tensors that are still in use keep their mapping."""
        for handle in self._open.values():
            with suppress(Exception):
                handle.__exit__(None, None, None)
        self._open.clear()


def _lies_in_file(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a file's mapping, so that what is dropped can be read again."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, _, last = span.partition("-")
        if int(first, 16) <= address < int(last, 16):
            return inode != "0"
    return False


def _let_go(tensor: Tensor) -> None:
    """Give back the whole pages of a mapped tensor; they are read again when they are looked at."""
    page = mmap.PAGESIZE
    start = tensor.data_ptr()
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if last > first:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _some(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
