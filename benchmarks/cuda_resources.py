"""Compiles every CUDA source for GPUs that need not be there, and writes down what it takes.

    python benchmarks/cuda_resources.py [--capabilities 8.0,8.7,8.9,9.0 | --tiles 8.7:64x128x128-32x64-3 ...]
                                        [--kernels int8_gemm,decode_attention,few_rows,some_rows,many_rows]
                                        [--rows rows.jsonl] [--write docs/reference/cuda-kernels.md]

Prints a Markdown table of what ptxas says of each kernel: registers a thread, bytes of shared memory a block,
bytes spilled. Of the linear nodes of few rows, whose libraries hold 18 to 39 kernels, the one with most registers, the
bytes that any of them spills at most, and shared memory for one row of 4096 columns with a norm, staged by 8 warps; of
that of some rows likewise, with shared memory for 8 rows, 96 of the weight and 5 stages of 64 columns; of that of many
rows, which 9.0 alone has, for 32 rows, 64 of the weight and 7 stages of 128 columns.
Ends with an error where one spills more than SPILLS allows or asks for more than its device has. Compiles through
the cache, so a second run takes no time. --tiles names tiles of int8_gemm or formats of few_rows (8.0:int4_g32).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pymllm_kernels.cuda import decode_library, few_rows_library, many_rows_library, some_rows_library
from pymllm_kernels.cuda.few_rows_library import FORMATS, Arguments, Format
from pymllm_kernels.cutlass.library import recipe
from pymllm_kernels.cutlass.tiles import Capability, Tile, tile_named, tiles_for
from pymllm_kernels.cutlass.toolchain import cutlass_version, find_cutlass, find_nvcc
from pymllm_kernels.jit import build_library, compiler_version
from pymllm_kernels.parallel import build_all

SHARED_LIMIT: dict[Capability, int] = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 7): 163 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
}
"""Bytes that a block may have (CUDA C++ Programming Guide, Technical Specifications per Compute Capability)."""

SPILLS = {"few_rows": 120}
"""Bytes that a kernel may spill. Those of int4 fill the registers at 17 to 32 rows, and with four scales a unit. That
fewer units on their way, or fewer blocks on a multiprocessor, would be better has not been measured."""

_PROPERTIES = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

# kWarps, kColumns, kSpare: the parameters of decode_attention.cu's kernel
_DECODE = re.compile(
    r"entry function '\w*decode_kernelILi(\d+)ELi(\d+)ELb([01])E.*?(?=Compiling|\Z)", re.DOTALL
)
# X_TILES, ROW_TILES, GATED, STAGED of tiles.h's kernel; ROWS, GATED, AHEAD of one_row.h's; X_TILES, GATED, NORM,
# BLOCK_K of some_rows.cu's; X_ROWS, GROUPS, GATED of many_rows.cu's
_FEW_ROWS = re.compile(
    r"entry function '\w*?(?P<kernel>(?:few_rows|some_rows|many_rows|one_row|prepare|widen)_kernel)"
    r"(?:I(?P<values>\w+?)EEv)?.*?(?=Compiling|\Z)",
    re.DOTALL,
)
_HEADS = {("1", "1"): "1-7", ("1", "0"): "8", ("2", "0"): "9-16"}


def resources(tile: Tile, capability: Capability) -> dict[str, Any]:
    """One row: what a tile takes on a device. Compiles it where the cache lacks it."""
    library = build_library(recipe(tile, torch.bfloat16, capability))
    log = (library.parent / "compiler.log").read_text()
    # A tile is one kernel; CUTLASS's helpers beside it, where there are any, are far smaller.
    found = max(_PROPERTIES.finditer(log), key=lambda match: int(match["registers"]), default=None)
    shared = ctypes.CDLL(str(library)).pymllm_int8_gemm_shared_memory
    shared.restype = ctypes.c_size_t
    return row_of(library, "int8_gemm", tile.name, capability, found, int(shared()))


def decode_resources(dim: int, capability: Capability) -> list[dict[str, Any]]:
    """One row for each instance of the decode attention for heads of this size."""
    library = build_library(decode_library.recipe(dim, torch.bfloat16, capability))
    log = (library.parent / "compiler.log").read_text()
    rows = []
    for match in sorted(_DECODE.finditer(log), key=lambda match: (int(match[1]), match[2], -int(match[3]))):
        warps, heads = int(match[1]), _HEADS[match[2], match[3]]
        shared = ctypes.CDLL(str(library)).pymllm_decode_attention_shared_memory(warps)
        assert shared == decode_library.shared_bytes(dim, warps)
        if shared > SHARED_LIMIT[capability]:
            continue  # never launched there
        tile = f"{dim}, {warps} warps, group {heads}"
        found = _PROPERTIES.search(match[0])
        rows.append(row_of(library, "decode_attention", tile, capability, found, shared))
    if not rows:
        raise SystemExit(f"ptxas names no kernel in {library.parent / 'compiler.log'}:\n{log}")
    return rows


def few_rows_resources(form: Format, capability: Capability) -> dict[str, Any]:
    """One row for all kernels of a format."""
    library = build_library(few_rows_library.recipe(form, capability))
    sizes = Arguments(m=1, k=4096, norm=1, staged=1, row_tiles=2, ahead=form.weights == "bfloat16", warps=8)
    shared = ctypes.CDLL(str(library)).pymllm_few_rows_shared_memory(ctypes.byref(sizes))
    return largest_of(library, "few_rows", form.name, capability, shared)


def some_rows_resources(capability: Capability) -> dict[str, Any]:
    """One row for all kernels."""
    library = build_library(some_rows_library.recipe(capability))
    product = Arguments(m=8, norm=1, warps=6)
    sizes = some_rows_library.Arguments(product=product, block_k=64, stages=5, splits=1)
    shared = ctypes.CDLL(str(library)).pymllm_some_rows_shared_memory(ctypes.byref(sizes))
    return largest_of(library, "some_rows", "bfloat16", capability, shared)


def many_rows_resources(capability: Capability) -> dict[str, Any]:
    """One row for all kernels."""
    library = build_library(many_rows_library.recipe(capability))
    sizes = many_rows_library.Arguments(x_rows=32, groups=1, stages=7, splits=1)
    shared = ctypes.CDLL(str(library)).pymllm_many_rows_shared_memory(ctypes.byref(sizes))
    return largest_of(library, "many_rows", "bfloat16", capability, shared)


def largest_of(library: Path, kernel: str, tile: str, capability: Capability, shared: int) -> dict[str, Any]:
    """One row for a library of many kernels."""
    log = (library.parent / "compiler.log").read_text()
    kernels = [(match, _PROPERTIES.search(match[0])) for match in _FEW_ROWS.finditer(log)]
    found = {match: properties for match, properties in kernels if properties is not None}
    if not found or len(found) < log.count("Compiling entry function"):
        raise SystemExit(f"not all kernels are known of {library.parent / 'compiler.log'}")
    most = max(found, key=lambda match: (int(found[match]["registers"]), int(found[match]["stores"])))
    row = row_of(library, kernel, tile, capability, found[most], shared)
    for key in ("stores", "loads"):
        row[f"spill_{key}"] = max(int(each[key]) for each in found.values())
    values = re.findall(r"L[ib](\d+)", most["values"] or "")
    return row | {"kernels": len(found), "largest": f"{most['kernel']}<{', '.join(values)}>"}


def row_of(
    library: Path, kernel: str, tile: str, capability: Capability, found: re.Match[str] | None, shared: int
) -> dict[str, Any]:
    if found is None:
        raise SystemExit(f"ptxas says nothing of registers in {library.parent / 'compiler.log'}")
    return {
        "capability": f"{capability[0]}.{capability[1]}",
        "kernel": kernel,
        "tile": tile,
        "registers": int(found["registers"]),
        "shared": shared,
        "shared_limit": SHARED_LIMIT[capability],
        "spill_stores": int(found["stores"]),
        "spill_loads": int(found["loads"]),
        "stack": int(found["stack"]),
        "library_bytes": library.stat().st_size,
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row."""
    found = []
    if row["shared"] > row["shared_limit"]:
        found.append(f"takes {row['shared']} bytes of shared memory, a block has {row['shared_limit']}")
    if max(row["spill_stores"], row["spill_loads"]) > SPILLS.get(row["kernel"], 0):
        found.append(f"spills {row['spill_stores']} bytes")
    return [f"{row['kernel']} {row['tile']} at {row['capability']} {fault}" for fault in found]


def line(row: dict[str, Any]) -> str:
    tile = row["tile"] + (f", {row['kernels']} kernels: `{row['largest']}`" if "largest" in row else "")
    return (
        f"| {row['capability']} | `{row['kernel']}` | {tile} | {row['registers']} | {row['shared']} "
        f"| {row['spill_stores']} | {row['library_bytes'] // 1024} |"
    )


HEAD = """# Resources of the CUDA kernels

Made by `python benchmarks/cuda_resources.py --write docs/reference/cuda-kernels.md`: what ptxas says of each CUDA
source, compiled with every tile of its device's table and results in bfloat16. Nothing is run. Registers and
spilled bytes are of a thread, shared memory in bytes of a block, which may have 166912 at 8.0 and 8.7, 101376 at
8.6 and 8.9, and 232448 at 9.0; where the decode attention's splits are a cluster, a block has up to 125 kB more than
listed. `few_rows` has a library for each format of weights: the kernel with most registers is named (numbers:
tiles of 8 rows of x, tiles of 16 rows of the weight, gated, staged; of `one_row`: results of a warp, gated, loads
ahead), the spilled bytes are the most of any, shared memory is that of one row of 4096 columns with a norm.
`some_rows` likewise (numbers: tiles of 8 rows of x, gated, norm, columns of a chunk); shared memory is that of
8 rows of x with a norm, 96 rows of the weight and 5 stages of 64 columns. `many_rows` (numbers: rows of x, groups of
four warps, gated), which 9.0 alone has, with that of 32 rows of x, 64 of the weight and 7 stages of 128 columns.
Triton's kernels have [a table of their own](gpu-kernels.md).

| capability | kernel | tile | registers | shared | spilled | library KiB |
|---|---|---|---|---|---|---|
"""


def capability_of(text: str) -> Capability:
    return int(text[0]), int(text[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--capabilities", default="8.0,8.7,8.9,9.0")
    source.add_argument("--tiles", nargs="+", metavar="X.Y:NAME", help="single tiles, each with its device")
    parser.add_argument("--kernels", default="int8_gemm,decode_attention,few_rows,some_rows,many_rows")
    parser.add_argument("--rows", type=Path, help="JSONL to write")
    parser.add_argument("--write", type=Path, help="Markdown to write")
    arguments = parser.parse_args()
    kernels = arguments.kernels.split(",")
    wanted: list[Capability] = []
    forms = {form.name: form for form in FORMATS}
    few: list[tuple[Format, Capability]] = []
    if arguments.tiles:
        named = [(text.partition(":")[2], capability_of(text)) for text in arguments.tiles]
        few = [(forms[name], capability) for name, capability in named if name in forms]
        pairs = [
            (tile_named(name, capability), capability) for name, capability in named if name not in forms
        ]
    else:
        wanted = [capability_of(text) for text in arguments.capabilities.split(",")]
        pairs = [(tile, capability) for capability in wanted for tile, _ in tiles_for(capability)]
        few = [(form, capability) for capability in wanted for form in FORMATS]
    if "int8_gemm" not in kernels:
        pairs = []
    if "few_rows" not in kernels:
        few = []
    heads = [(dim, capability) for capability in wanted for dim in decode_library.DIMS]
    if "decode_attention" not in kernels:
        heads = []
    build_all([recipe(tile, torch.bfloat16, capability) for tile, capability in pairs])
    build_all([decode_library.recipe(dim, torch.bfloat16, capability) for dim, capability in heads])
    build_all([few_rows_library.recipe(form, capability) for form, capability in few])
    some = wanted if "some_rows" in kernels else []
    build_all([some_rows_library.recipe(capability) for capability in some])
    many = [one for one in wanted if one == many_rows_library.CAPABILITY] if "many_rows" in kernels else []
    build_all([many_rows_library.recipe(capability) for capability in many])
    rows = [resources(tile, capability) for tile, capability in pairs]
    rows += [row for dim, capability in heads for row in decode_resources(dim, capability)]
    rows += [few_rows_resources(form, capability) for form, capability in few]
    rows += [some_rows_resources(capability) for capability in some]
    rows += [many_rows_resources(capability) for capability in many]
    text = HEAD + "\n".join(map(line, rows)) + "\n"
    print(text)
    if arguments.write:
        arguments.write.write_text(text)
    if arguments.rows:
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        release = re.search(r"release (\S+),", compiler_version(str(find_nvcc())))
        circumstances = {
            "commit": commit,
            "command": " ".join(sys.argv),
            "nvcc": release[1] if release else "unknown",
        }
        if pairs:
            circumstances["cutlass"] = ".".join(map(str, cutlass_version(find_cutlass())))
        written = [{"_": circumstances}, *rows]
        arguments.rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    if bad := [fault for row in rows for fault in faults(row)]:
        raise SystemExit("these kernels take too much:\n" + "\n".join(bad))


if __name__ == "__main__":
    main()
