"""The CUTLASS int8 product on a GPU: is every tile exact, and which is fastest for which shape.

    python benchmarks/gpu_int8.py [--tiles NAME ... | --libraries DIR] [--out rows.jsonl]

By default the tiles of this device's table are timed. --tiles names others, e.g.
``128x256x128-2x1-cooperative`` on Hopper (block, cluster, schedule) or ``128x128x64-64x64-4`` before it (block,
warp, stages). They come from a bundle, the cache or the compiler; DIR holds prebuilt libraries instead, one a
file named after its tile. Results are in bfloat16. Times are those of CUDA graphs whose weights take turns, so
that none is still in the L2 cache.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm_core.nn.quant_ops import w8a8_epilogue
from pymllm_kernels.cutlass.gemm import Int8Gemm

SHAPES = {  # N, K of Qwen3-8B and, smaller, of Qwen3-0.6B
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (24576, 4096),
    "8B down": (4096, 12288),
    "0.6B gate_up": (6144, 1024),
    "0.6B down": (1024, 3072),
}
ROWS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WALKS = ((0, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8))
"""Raster and swizzle: how tiles are walked. The first is the one that the tables are made with."""

BF16 = torch.bfloat16


def load(folder: Path) -> dict[str, Int8Gemm]:
    """The prebuilt libraries of a folder."""
    return {
        path.stem: Int8Gemm(ctypes.CDLL(str(path.resolve())), BF16) for path in sorted(folder.glob("*.so"))
    }


def build(names: list[str] | None) -> dict[str, Int8Gemm]:
    """The tiles with these names, or those of this device's table."""
    from pymllm_kernels.cutlass.library import int8_gemm_kernel, recipe
    from pymllm_kernels.cutlass.tiles import tile_named, tiles_for
    from pymllm_kernels.parallel import build_all

    capability = torch.cuda.get_device_capability()
    tiles = [tile_named(name, capability) for name in names or ()]
    tiles = tiles or [tile for tile, _ in tiles_for(capability)]
    build_all([recipe(tile, BF16, capability) for tile in tiles])
    return {tile.name: int8_gemm_kernel(tile, BF16, capability) for tile in tiles}


def codes(*shape: int, generator: torch.Generator) -> Tensor:
    """int8 codes as quantised normal values have them: power, and so the clock, depends on the data."""
    wide = torch.randn(*shape, generator=generator, device="cuda").mul_(32).round_().clamp_(-128, 127)
    return wide.to(torch.int8)


def cases() -> Iterator[dict[str, Any]]:
    """Small shapes with odd M and every part of the epilogue on and off."""
    for seed, (m, n, k) in enumerate(
        [(1, 16, 16), (17, 144, 272), (33, 1024, 1040), (129, 272, 4096), (257, 4112, 512), (2047, 784, 4096)]
    ):
        for parts in range(16):
            yield {
                "seed": 16 * seed + parts,
                "shape": (m, n, k),
                "asymmetric": bool(parts & 1),
                "bias": bool(parts & 2),
                "residual": bool(parts & 4),
                "per_row": bool(parts & 8),
            }


def wrong(gemm: Int8Gemm) -> list[str]:
    """What differs from the definition, which the product must match bit for bit."""
    found = []
    for case in cases():
        generator = torch.Generator("cuda").manual_seed(case["seed"])
        m, n, k = case["shape"]
        a, b = codes(m, k, generator=generator), codes(n, k, generator=generator)
        rows = m if case["per_row"] else 1
        a_scale = torch.rand(rows, 1, generator=generator, device="cuda") / 127
        b_scale = torch.rand(n, generator=generator, device="cuda") / 127
        zero_point = b_sum = bias = residual = None
        if case["asymmetric"]:
            zero_point = torch.randint(
                -70000, 70000, (rows, 1), generator=generator, device="cuda", dtype=torch.int32
            )
            b_sum = b.sum(1, dtype=torch.int32)
        if case["bias"]:
            bias = torch.randn(n, generator=generator, device="cuda")
        if case["residual"]:  # rows of a wider tensor
            residual = torch.randn(m, n + 64, generator=generator, device="cuda").to(BF16)[:, :n]
        product = (a.double() @ b.double().t()).to(torch.int64)  # exact: sums are under 2^53
        expected = w8a8_epilogue(product, a_scale, zero_point, b_scale, b_sum, bias)
        if residual is not None:
            expected = expected + residual.float()
        out = torch.full((m, n), float("nan"), dtype=BF16, device="cuda")
        gemm(
            a, b, a_scale, b_scale, zero_point=zero_point, b_sum=b_sum, bias=bias, residual=residual, out=out
        )
        torch.cuda.synchronize()
        bad = int((out != expected.to(BF16)).sum())
        if bad:
            found.append(f"{case}: {bad} of {out.numel()} differ")
    return found


def microseconds(call: Callable[[int], Any], copies: int) -> float:
    """Median time of one call, in a graph in which `copies` of the weights take turns."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(copies):
            call(turn)
    graph.replay()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    total = 0.0
    while len(times) < 5 or (total < 30 and len(times) < 50):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        total += times[-1]
    return statistics.median(times) * 1000 / copies


class Layer:
    """One shape's weights, copied until together they exceed any L2 cache, and the calls to be timed."""

    def __init__(self, name: str, n: int, k: int, generator: torch.Generator) -> None:
        self.name, self.n, self.k, self.generator = name, n, k, generator
        self.copies = min(max(-(-150_000_000 // (n * k)), 4), 48)
        self.weights = [codes(n, k, generator=generator) for _ in range(self.copies)]
        self.dense = self.weights[0].to(BF16)
        self.scale = torch.rand(n, generator=generator, device="cuda") / 127

    def time(self, m: int, gemms: dict[str, Int8Gemm], *, walks: bool) -> Iterator[dict[str, Any]]:
        """Rows of cuBLAS's int8 product without an epilogue, of cuBLAS in bfloat16, and of every tile."""
        a = codes(m, self.k, generator=self.generator)
        a_scale = torch.rand(m, 1, generator=self.generator, device="cuda") / 127
        wide = a.to(BF16)
        out = torch.empty((m, self.n), dtype=BF16, device="cuda")
        product = torch.empty((m, self.n), dtype=torch.int32, device="cuda")
        added = None
        if self.name.endswith((" o", " down")):
            added = torch.randn(m, self.n, generator=self.generator, device="cuda").to(BF16)

        def int8(turn: int) -> None:
            torch._int_mm(a, self.weights[turn].t(), out=product)

        def bf16(turn: int) -> None:
            torch.mm(wide, self.dense.t(), out=out)

        def tile(turn: int, gemm: Int8Gemm, raster: int, swizzle: int) -> None:
            b = self.weights[turn]
            gemm(a, b, a_scale, self.scale, residual=added, out=out, raster=raster, swizzle=swizzle)

        yield self.row(m, "cublas int8", microseconds(int8, self.copies))
        yield self.row(m, "cublas bf16", microseconds(bf16, self.copies))
        for name, gemm in gemms.items():
            for raster, swizzle in WALKS if walks and m in (2048, 8192) else WALKS[:1]:
                call = functools.partial(tile, gemm=gemm, raster=raster, swizzle=swizzle)
                us = microseconds(call, self.copies)
                yield self.row(m, name, us, raster=raster, swizzle=swizzle)

    def row(self, m: int, tile: str, us: float, **more: int) -> dict[str, Any]:
        tops = 2 * m * self.n * self.k / us / 1e6
        shape = {"layer": self.name, "M": m, "N": self.n, "K": self.k}
        return {**shape, "tile": tile, **more, "us": round(us, 2), "TOP/s": round(tops, 1)}


def node_times(rows_of_a: list[int]) -> Iterator[dict[str, Any]]:
    """The whole W8A8 node, with the norm and residual that its layer has, on CUTLASS and on Triton alone."""
    from pymllm_kernels.cutlass.w8a8 import CutlassW8A8
    from pymllm_kernels.triton.w8a8 import TritonW8A8

    generator = torch.Generator("cuda").manual_seed(1)
    for name, (n, k) in SHAPES.items():
        act = "silu_mul" if name.endswith("gate_up") else None
        norm = None if name.endswith((" o", " down")) else (torch.ones(k, dtype=BF16, device="cuda"), 1e-6)
        copies = min(max(-(-150_000_000 // (n * k)), 4), 48)
        for kind, node in (("triton", TritonW8A8()), ("cutlass", CutlassW8A8())):
            scale = torch.rand(n, generator=generator, device="cuda") / 127
            weights = [
                node.pack({"weight": codes(n, k, generator=generator), "weight_scale": scale}, act=act)
                for _ in range(copies)
            ]
            for m in rows_of_a:
                x = torch.randn(m, k, generator=generator, device="cuda").to(BF16)
                added = None if norm else torch.zeros(m, n, dtype=BF16, device="cuda")

                def call(turn: int, node: Any = node, x: Tensor = x, added: Tensor | None = added) -> None:
                    node.apply(x, weights[turn], norm=norm, residual=added)  # noqa: B023  # called at once

                us = microseconds(call, copies)
                yield {"node": kind, "layer of": name, "M": m, "N": n, "K": k, "us": round(us, 2)}


def table(rows: list[dict[str, Any]]) -> None:
    """TOP/s by tile and M, one block a layer; of several walks the best, named where it is not the first."""
    for layer in SHAPES:
        of_layer = [row for row in rows if row.get("layer") == layer]
        if not of_layer:
            continue
        sizes = sorted({row["M"] for row in of_layer})
        print(f"\n{layer}  N={of_layer[0]['N']} K={of_layer[0]['K']}, TOP/s")
        print(f"{'M':34}" + "".join(f"{m:>11}" for m in sizes))
        for tile in dict.fromkeys(row["tile"] for row in of_layer):
            cells = []
            for m in sizes:
                best = max(
                    (row for row in of_layer if row["tile"] == tile and row["M"] == m),
                    key=lambda row: float(row["TOP/s"]),
                    default=None,
                )
                if best is None:
                    cells.append(f"{'':>11}")
                    continue
                walk = (best.get("raster", 0), best.get("swizzle", 1))
                mark = "" if walk == WALKS[0] else f"{'?MN'[walk[0]]}{walk[1]}"
                cells.append(f"{best['TOP/s']:>8.0f}{mark:<3}")
            print(f"{tile:34}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tiles", nargs="+", metavar="NAME", help="instead of the device's table")
    source.add_argument("--libraries", type=Path, help="folder of prebuilt libraries")
    parser.add_argument("--out", type=Path, help="JSONL to append to")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="values of M")
    parser.add_argument("--no-walks", action="store_true", help="only one order of walking over tiles")
    parser.add_argument("--nodes", action="store_true", help="only whole W8A8 nodes, beside Triton's")
    arguments = parser.parse_args()

    if arguments.nodes:
        for row in node_times(list(arguments.rows)):
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        return
    gemms = load(arguments.libraries) if arguments.libraries else build(arguments.tiles)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    rows: list[dict[str, Any]] = []

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    emit(
        {
            "_": {
                "machine": torch.cuda.get_device_name(),
                "commit": commit.stdout.strip(),
                "command": " ".join(sys.argv),
                "torch": torch.__version__,
            }
        }
    )
    exact: dict[str, Int8Gemm] = {}
    for tile, gemm in gemms.items():
        bad = wrong(gemm)
        print(
            f"{tile:34} {'exact in 96 cases' if not bad else f'WRONG in {len(bad)} cases: {bad[0]}'}",
            flush=True,
        )
        emit({"tile": tile, "exact": not bad})
        if not bad:
            exact[tile] = gemm
    generator = torch.Generator("cuda").manual_seed(0)
    for name, (n, k) in SHAPES.items():
        layer = Layer(name, n, k, generator)
        for m in arguments.rows:
            for row in layer.time(m, exact, walks=not arguments.no_walks):
                emit(row)
    table(rows)
    if len(exact) < len(gemms):
        sys.exit("some tiles are wrong; see above")


if __name__ == "__main__":
    main()
