"""Write safetensors of known shapes piece by piece: the headers first, then the bytes of tensors as they come.

The library's own writer wants all tensors of a file in memory. Format:
https://huggingface.co/docs/safetensors (eight bytes of the header's length, little-endian; the header, JSON,
filled up with spaces; the tensors' bytes without gaps). Names of files and the index are those of transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pymllm_core.engine.headers import INDEX_NAME, SINGLE_NAME
from pymllm_core.errors import CheckpointError

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits of one element, by the format's names of dtypes."""
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written. dtype: as the format spells it, e.g. ``BF16``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in BITS:
            raise CheckpointError(f"tensor {self.name} is of type {self.dtype}, which cannot be copied")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(slots=True)
class _Place:
    """Where the next byte of a tensor goes, and where its last one ends."""

    file: BinaryIO
    at: int
    end: int


class ShardWriter:
    """Writes `entries` into files of at most `limit` bytes of tensors (a larger tensor has a file of its own).

    A context manager; tensors come by `write`, in any order, each in one piece or in several. Leaving it
    without an exception writes the index, where there are several files.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], limit: int) -> None:
        self._folder = folder
        self._shards = _divide(entries, limit)
        self._names = (
            [SINGLE_NAME]
            if len(self._shards) == 1
            else [
                f"model-{number:05}-of-{len(self._shards):05}.safetensors"
                for number in range(1, len(self._shards) + 1)
            ]
        )
        self._places: dict[str, _Place] = {}
        self._files = ExitStack()

    def __enter__(self) -> ShardWriter:
        for name, entries in zip(self._names, self._shards, strict=True):
            file = self._files.enter_context((self._folder / name).open("wb"))
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            # As the library orders them: the largest type first, so that every tensor is aligned.
            for entry in sorted(entries, key=lambda entry: (-BITS[entry.dtype], entry.name)):
                offsets = [end, end + entry.num_bytes]
                header[entry.name] = {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "data_offsets": offsets,
                }
                end += entry.num_bytes
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % _ALIGNMENT)
            file.write(len(text).to_bytes(8, "little") + text)
            begin = 8 + len(text)
            file.truncate(begin + end)
            for entry in entries:
                start, stop = header[entry.name]["data_offsets"]
                self._places[entry.name] = _Place(file, begin + start, begin + stop)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the elements of `tensor` to those of `name` that were written before."""
        place = self._places[name]
        if place.at + tensor.nbytes > place.end:
            raise ValueError(f"{tensor.nbytes} bytes for {name}, of which {place.end - place.at} were left")
        place.file.seek(place.at)
        place.file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        place.at += tensor.nbytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.close()
        if kind is not None:
            return
        short = [name for name, place in self._places.items() if place.at != place.end]
        if short:
            raise ValueError(f"never or not wholly written: {', '.join(short)}")
        if len(self._names) > 1:
            index = {
                "metadata": {"total_size": sum(entry.num_bytes for shard in self._shards for entry in shard)},
                "weight_map": {
                    entry.name: name
                    for name, entries in zip(self._names, self._shards, strict=True)
                    for entry in entries
                },
            }
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _divide(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards
