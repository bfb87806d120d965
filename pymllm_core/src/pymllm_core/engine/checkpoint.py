"""A model folder on disk: its config and its safetensors, read lazily and checked before use."""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pymllm_core.errors import CheckpointError
from pymllm_core.protocols.quant import WeightSlot

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file and what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a model folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True, slots=True)
class _Stored:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder's safetensors. Opening reads headers only; tensors are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._read: list[Tensor] = []
        self._mapped: dict[Path, bool] = {}
        self._stored: dict[str, _Stored] = {}
        for file in self._files():
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if name in self._stored:
                    raise CheckpointError(
                        f"tensor {name!r} is stored twice, in {self._stored[name].file.name} and {file.name}"
                    )
                found = handle.get_slice(name)
                self._stored[name] = _Stored(file, tuple(found.get_shape()), found.get_dtype())

    def _files(self) -> list[Path]:
        folder = self.folder
        if (folder / INDEX_NAME).is_file():
            weight_map = read_json(folder / INDEX_NAME).get("weight_map")
            if not isinstance(weight_map, Mapping) or not weight_map:
                raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map")
            names = sorted({str(value) for value in weight_map.values()})
            for name in names:
                # A hostile index must not point outside the folder.
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise CheckpointError(
                        f"{folder / INDEX_NAME} names {name!r}, which is no file of the folder"
                    )
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {INDEX_NAME} names")
            return [folder / name for name in names]
        files = [folder / SINGLE_NAME] if (folder / SINGLE_NAME).is_file() else []
        files = files or sorted(folder.glob("*.safetensors"))
        if not files:
            other = sorted(path.name for path in folder.glob("*.bin"))
            hint = f" ({', '.join(other)} are pickles, which are never loaded; convert them)" if other else ""
            raise CheckpointError(f"{folder} holds no .safetensors file{hint}")
        return files

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
        wanted = {slot.name: slot for slot in slots}
        missing = [n for n, slot in wanted.items() if n not in self._stored and not slot.optional]
        shapes = [
            f"{name} is {list(self._stored[name].shape)}, expected {list(slot.shape)}"
            for name, slot in wanted.items()
            if name in self._stored and self._stored[name].shape != slot.shape
        ]
        unused = sorted(self._stored.keys() - wanted.keys() - ignored)
        problems = [
            f"{title}: {_some(found)}"
            for title, found in (
                ("missing", missing),
                ("wrong shape", shapes),
                ("not used by the model", unused),
            )
            if found
        ]
        if problems:
            raise CheckpointError(f"{self.folder} does not fit its config.json. " + ". ".join(problems))

    def read(self, slot: WeightSlot) -> Tensor | None:
        """A tensor as stored, memory-mapped; None for an absent optional one."""
        if slot.name not in self._stored:
            return None
        tensor = self._tensor(slot.name)
        if tensor.is_floating_point() != slot.dtype.is_floating_point:
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
