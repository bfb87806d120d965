"""Which safetensors files a folder holds and what their headers say; no tensor data is read.

The format: https://github.com/huggingface/safetensors#format. A file is 8 bytes (little-endian length of the
header), the header (JSON), and the tensors' bytes, which cover the rest of the file without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pymllm_core.errors import CheckpointError
from pymllm_core.protocols.lint import StoredTensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library (``MAX_HEADER_SIZE``)."""

BITS: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of one number by the format's name of its dtype."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file and what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True, slots=True)
class Problem:
    """Something for which the weights cannot be loaded.

    code: its kind, for scripts. file: the name of the file that is at fault, "" for the folder.
    """

    code: str
    file: str
    message: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What the headers of a folder's files say, as far as they can be read.

    files: in the order in which they are read. problems: empty where the files can be loaded.
    """

    files: list[Path]
    tensors: dict[str, StoredTensor]
    problems: list[Problem]


def scan(folder: Path) -> Scan:
    """Read the headers of all weight files of `folder`; what is wrong with them is said, not raised."""
    files, problems = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found, wrong = read_header(file)
        if wrong is not None:
            problems.append(Problem("damaged-file", file.name, wrong))
        for name, tensor in found.items():
            if name in tensors:
                both = f"{tensors[name].file.name} and {file.name}"
                message = f"tensor {name!r} is stored twice, in {both}"
                problems.append(Problem("duplicate-tensor", file.name, message))
            else:
                tensors[name] = tensor
    return Scan(files, tensors, problems)


def weight_files(folder: Path) -> tuple[list[Path], list[Problem]]:
    """The files that hold the weights: those of the index, else the single file, else all safetensors."""
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map = read_json(index).get("weight_map")
        except CheckpointError as error:
            return [], [Problem("bad-index", INDEX_NAME, str(error))]
        if not isinstance(weight_map, Mapping) or not weight_map:
            return [], [Problem("bad-index", INDEX_NAME, f"{index} has no weight_map")]
        names = sorted({str(value) for value in weight_map.values()})
        # A hostile index must not point outside the folder.
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        problems = [
            Problem("bad-index", INDEX_NAME, f"{index} names {name!r}, which is no file of the folder")
            for name in outside
        ]
        inside = [name for name in names if name not in outside]
        missing = [name for name in inside if not (folder / name).is_file()]
        if missing:
            message = f"{folder} lacks {', '.join(missing)}, which {INDEX_NAME} names"
            problems.append(Problem("missing-file", INDEX_NAME, message))
        return [folder / name for name in inside if name not in missing], problems
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME], []
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if files:
        return files, []
    other = sorted(path.name for path in folder.glob("*.bin"))
    hint = f" ({', '.join(other)} are pickles, which are never loaded; convert them)" if other else ""
    return [], [Problem("no-weights", "", f"{folder} holds no .safetensors file{hint}")]


def read_header(file: Path) -> tuple[dict[str, StoredTensor], str | None]:
    """The file's tensors, and why it cannot be loaded (None where it can).

    A file that was cut off has a header that is whole: its tensors are returned beside the reason.
    """
    tensors: dict[str, StoredTensor] = {}
    size = 0
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            _parse(_header_bytes(stream.read(8), stream, size), file, tensors)
            end = stream.tell() + sum(tensor.num_bytes for tensor in tensors.values())
    except (OSError, ValueError, RecursionError) as error:
        why = "its header is nested too deep" if isinstance(error, RecursionError) else str(error)
    else:
        if end == size:
            return tensors, None
        if size < end:
            why = f"it was cut off, by its header it has {end:,} bytes"
        else:
            why = f"behind its tensors, which end at byte {end:,}, more bytes follow"
    return tensors, f"{file} ({size:,} bytes) is no whole safetensors file: {why}; download it again"


def _header_bytes(prefix: bytes, stream: Any, size: int) -> bytes:
    if len(prefix) < 8:
        raise ValueError("it is shorter than the length of a header")
    if prefix == bytes(8):
        raise ValueError("it begins with zeros, as a file that was allocated and not written")
    if prefix.startswith(b"version "):
        raise ValueError("it is a pointer of Git LFS, the file itself was not fetched")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(f"its header would have {length:,} bytes")
    raw: bytes = stream.read(length)
    return raw


def _parse(raw: bytes, file: Path, tensors: dict[str, StoredTensor]) -> None:
    """Fill `tensors`, none of them where the header is malformed. Raises ValueError saying why."""
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"its header is no UTF-8 ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"its header is a JSON {type(header).__name__}, expected an object")  # noqa: TRY004
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("its __metadata__ is no object of texts")
    found, spans = {}, []
    for name, entry in header.items():
        name.encode()  # half of a surrogate pair is a ValueError
        found[name], start = _entry(name, entry, file)
        spans.append((start, start + found[name].num_bytes, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps another" if start < end else "leaves a hole before it"
            raise ValueError(f"tensor {name!r} {what} (data_offsets {start}..{stop}, expected {end})")
        end = stop
    tensors.update(found)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header has the key {twice!r} twice")
    return found


def _entry(name: str, entry: Any, file: Path) -> tuple[StoredTensor, int]:
    """One tensor of the header, and where its bytes begin."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {name!r} lacks a dtype, a shape or two data_offsets")
    if dtype not in BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    start, stop = offsets
    if (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"tensor {name!r}, {dtype} {shape}, cannot have {stop - start} bytes")
    return StoredTensor(file, dtype, tuple(shape), stop - start), start


def _sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a list of integers that a size can have."""
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 64 for size in value
    )
