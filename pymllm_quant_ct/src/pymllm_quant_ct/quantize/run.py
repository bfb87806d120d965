"""Quantise a checkpoint, a few rows at a time, into a folder that appears only when it is whole."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.engine.headers import read_json
from pymllm_core.engine.status import Progress, ProgressCallback
from pymllm_core.errors import CheckpointError
from pymllm_quant_ct.quantize.folder import appearing, check_out, copy_files
from pymllm_quant_ct.quantize.modules import WEIGHT, check_plain, select
from pymllm_quant_ct.quantize.rounding import ROW_UNIT, Error, Rounding
from pymllm_quant_ct.quantize.scheme import Request, quantization_config
from pymllm_quant_ct.quantize.shards import Entry, ShardWriter

BLOCK = 1 << 19
"""Weights that are computed at once: 2 MiB in float32, which with most of what lies between stays in a core's cache."""
DEFAULT_SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written, and what rounding changed. errors: relative, of each quantised module; see `Error`."""

    out: Path
    quantised: int
    left: tuple[str, ...]
    ignore: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    files: int
    errors: dict[str, float]

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors)

    def worst(self, count: int) -> list[tuple[str, float]]:
        """The modules that lost most, the worst first."""
        return sorted(self.errors.items(), key=lambda item: -item[1])[:count]


def quantise(
    model: Path,
    out: Path,
    request: Request,
    *,
    ignore: tuple[str, ...] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Summary:
    """Write `model` into the folder `out`, its linears quantised as requested.

    Everything is written into ``OUT.partial``, which is renamed at the end and removed where something fails.
    At no time more than one block of rows is held in memory. Raises CheckpointError where the model cannot be
    quantised, ConfigError where `out` cannot be written or what is asked for does not fit the model.
    """
    config = read_json(model / "config.json")
    check_plain(config, str(model))
    rounding = Rounding(request)
    checkpoint = Checkpoint(model)
    try:
        selection = select(checkpoint, ignore, request.group)
        modules = set(selection.modules)
        entries = _entries(checkpoint, modules, rounding)
        check_out(model, out, sum(entry.num_bytes for entry in entries), overwrite)
        with appearing(out, overwrite) as folder:
            with ShardWriter(folder, entries, shard_bytes) as writer:
                errors = _write(checkpoint, modules, rounding, writer, progress)
            copy_files(model, folder)
            config["quantization_config"] = quantization_config(rounding.scheme, selection.ignore)
            (folder / "config.json").write_text(
                json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            files = len(list(folder.glob("*.safetensors")))
    finally:
        checkpoint.close()
    return Summary(
        out=out,
        quantised=len(selection.modules),
        left=selection.left,
        ignore=selection.ignore,
        bytes_before=_total(checkpoint),
        bytes_after=sum(entry.num_bytes for entry in entries),
        files=files,
        errors=errors,
    )


# ---- weights ----


def _stored(checkpoint: Checkpoint) -> list[Entry]:
    dtypes = checkpoint.dtypes
    return [Entry(name, dtypes[name], shape) for name, shape in checkpoint.shapes.items()]


def _total(checkpoint: Checkpoint) -> int:
    return sum(entry.num_bytes for entry in _stored(checkpoint))


def _entries(checkpoint: Checkpoint, modules: set[str], rounding: Rounding) -> list[Entry]:
    entries: list[Entry] = []
    for entry in _stored(checkpoint):
        module = _module_of(entry.name, modules)
        entries += [entry] if module is None else rounding.entries(module, entry.shape, entry.dtype)
    return entries


def _module_of(name: str, modules: set[str]) -> str | None:
    """The module to be quantised whose weight this is."""
    module = name.removesuffix(WEIGHT)
    return module if name.endswith(WEIGHT) and module in modules else None


def _write(
    checkpoint: Checkpoint,
    modules: set[str],
    rounding: Rounding,
    writer: ShardWriter,
    progress: ProgressCallback | None,
) -> dict[str, float]:
    """Write all tensors; the relative error of each quantised module."""
    errors: dict[str, float] = {}
    done, total = 0, _total(checkpoint)
    for entry in _stored(checkpoint):
        module = _module_of(entry.name, modules)
        error = Error()
        for rows in checkpoint.rows(entry.name, _rows_of_block(entry.shape)):
            if module is None:
                writer.write(entry.name, rows)
            else:
                for last, part in _round(rounding, entry, rows, error).items():
                    writer.write(f"{module}.{last}", part)
            done += rows.nbytes
            if progress is not None:
                progress(Progress(f"quantising {module}" if module else "copying", done, total))
        if module is not None:
            errors[module] = error.relative
            if rounding.packed:
                writer.write(f"{module}.weight_shape", torch.tensor(entry.shape))
    return errors


def _round(rounding: Rounding, entry: Entry, rows: Tensor, error: Error) -> dict[str, Tensor]:
    """What is stored of these rows; the shape is that of the whole tensor, so it is not among it."""
    try:
        stored = rounding.block(rows, entry.dtype, error)
    except ValueError as reason:
        raise CheckpointError(f"tensor {entry.name} cannot be quantised: {reason}") from None
    stored.pop("weight_shape", None)
    return stored


def _rows_of_block(shape: tuple[int, ...]) -> int:
    columns = math.prod(shape[1:])
    return max(BLOCK // max(columns, 1) // ROW_UNIT, 1) * ROW_UNIT
