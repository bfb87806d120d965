"""Checks the Triton kernels against float64 and times many block sizes of each, on a GPU.

Each candidate is a chain of calls in a captured CUDA graph, with more weights than the second-level cache
holds. ``table`` is what the package's own table chooses; tuples are other values: BLOCK_N, BLOCK_K, warps,
stages, unroll for products; splits, BLOCK, warps, stages for decodes; BLOCK_M, BLOCK_N, warps, stages for
prefills. Every variant is appended to the file; the screen shows the best of them.

    python benchmarks/gpu_kernels.py [--models 0.6B,8B] [--only linear,w8a8,w4a16,w8a16,prep,decode,prefill]
                                     [--rows 1,8,16,32] [--no-pdl] [--out results.jsonl]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_attention import bench_attention, bench_prep
from gpu_timing import MODELS, Report, copies_of
from torch import Tensor

from pymllm_core.nn import quant_ops
from pymllm_kernels.triton import linear, w4a16, w8a8, w8a16
from pymllm_kernels.triton.launch import ceil_div, gpu, pretend
from pymllm_kernels.triton.linear_plan import Blocks

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
NODES: dict[str, Any] = {
    "linear": linear.TritonLinear(),
    "w8a8": w8a8.TritonW8A8(),
    "w4a16": w4a16.TritonW4A16(),
    "w8a16": w8a16.TritonW8A16(),
}
MODULES: dict[str, Any] = {"linear": linear, "w8a8": w8a8, "w4a16": w4a16, "w8a16": w8a16}
BITS = {"linear": 16, "w8a8": 8, "w4a16": 4, "w8a16": 8}


def tensors(kind: str, n: int, k: int) -> dict[str, Tensor]:
    """Random weights of an operation."""
    if kind == "linear":
        return {"weight": torch.randn(n, k, dtype=BF16, device=DEVICE) * k**-0.5}
    if kind != "w4a16":
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
        if kind == "w8a16":
            return {"weight": weight, "scale": (torch.rand(n, 1, device=DEVICE) * k**-0.5 / 64).to(BF16)}
        return {"weight": weight, "weight_scale": torch.rand(n, device=DEVICE) * k**-0.5 / 64 + 1e-5}
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    scale = torch.rand(n, k // 128, device=DEVICE) * k**-0.5 / 4 + 1e-4
    return {"weight": packed, "scale": scale.to(BF16)}


def reference(
    kind: str, x: Tensor, weights: dict[str, Tensor], gated: bool, norm: Any, residual: Any
) -> Tensor:
    wide = x.double()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm[1]) * norm[0].double()
    if kind == "linear":
        y = wide @ weights["weight"].double().T
    elif kind == "w8a8":
        codes, scale = quant_ops.quantize_per_token_int8(wide.float())
        y = codes.double() @ weights["weight"].double().T * scale * weights["weight_scale"]
    else:
        codes = weights["weight"]
        if kind == "w4a16":
            codes = quant_ops.unpack_int4(codes, x.shape[1])
        y = wide @ quant_ops.dequantize(codes, weights["scale"].double()).T
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = gate * torch.sigmoid(gate) * up
    return y if residual is None else y + residual.double()


def with_blocks(fill: Callable[..., None], blocks: Any) -> Callable[..., None]:
    """fill with its last argument given."""
    return lambda *arguments: fill(*arguments, blocks)


def variants(kind: str, rows: int, n: int, k: int, gated: bool) -> Iterator[tuple[str, Callable[..., None]]]:
    """Candidates by name: each fills out from (x, packed, norm, residual, out)."""
    matrices = 2 if gated else 1
    if rows == 1:
        module, bits = MODULES[kind], BITS[kind]
        for block_n, block_k, warps in itertools.product((2, 4, 8, 16), (512, 1024, 2048, 4096), (2, 4, 8)):
            loaded = block_n * block_k * matrices * bits // 8
            if not 2048 <= loaded <= 32768 or block_k > 1 << (k - 1).bit_length() or loaded < warps * 512:
                continue
            if kind == "w8a8" and loaded > 16384:
                continue
            steps = ceil_div(k, block_k)
            loops = [(1, steps)] if steps <= 4 or kind == "w8a8" else [(1, 4)]
            if kind == "linear" and steps > 2:
                loops += [(1, 2), (3, 1)]
            for stages, unroll in loops:
                blocks = Blocks(block_n, block_k, warps, stages, unroll)
                yield str(dataclasses.astuple(blocks)), with_blocks(module.matvec, blocks)
    elif kind == "w8a8":
        wide = rows > 64
        choices: Any = (
            [(128, 128, 128, 8, 3), (128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (64, 128, 128, 4, 4),
             (128, 64, 128, 4, 4), (128, 128, 64, 8, 4), (64, 64, 128, 4, 4), (64, 256, 128, 8, 3)]
            if wide else
            [(max(1 << (rows - 1).bit_length(), 16), bn, bk, w, s) for bn, bk, w, s in itertools.product(
                (16, 32, 64), (128, 256, 512), (2, 4), (3, 5))]
        )  # fmt: skip
        for block_m, block_n, block_k, warps, stages in choices:
            block = Blocks(max(block_n // matrices, 8), block_k, warps, stages)
            name = str((block_m, *dataclasses.astuple(block)))
            yield name, with_blocks(w8a8.matmul, (block_m, block))
    elif rows <= 64:
        few = MODULES[kind].few_rows
        widths = (128, 256, 512) if kind == "w4a16" else (64, 128, 256)
        for block_n, block_k, warps, stages in itertools.product((16, 32, 64), widths, (2, 4, 8), (3, 5)):
            if block_n * warps > 256 or (kind == "w4a16" and stages == 5):
                continue
            block = Blocks(block_n // (2 if gated and block_n > 16 else 1), block_k, warps, stages)
            yield str(dataclasses.astuple(block)), with_blocks(few, block)


def bench_linear(
    report: Report,
    kind: str,
    model: str,
    name: str,
    sizes: tuple[int, int, bool, bool, bool],
    rows: int,
    *,
    tried: bool,
) -> None:
    """One projection. sizes: as `Shape.linears` gives them. tried: time the variants, too."""
    n, k, gated, with_norm, with_residual = sizes
    node = NODES[kind]
    act = "silu_mul" if gated else None
    first = tensors(kind, n, k)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    copies = copies_of(moved)
    packed = [node.pack(dict(first), act=act)]
    packed += [node.pack(tensors(kind, n, k), act=act) for _ in range(copies - 1)]
    x = torch.randn(rows, k, dtype=BF16, device=DEVICE)
    results = n // 2 if gated else n
    norm = (torch.randn(k, dtype=BF16, device=DEVICE), 1e-6) if with_norm else None
    residual = torch.randn(rows, results, dtype=BF16, device=DEVICE) if with_residual else None
    out_dtype = torch.float32 if name == "head" else BF16

    def filled(fill: Callable[..., None], weight: Any) -> Tensor:
        out = torch.empty((rows, results), dtype=out_dtype, device=DEVICE)
        fill(x, weight, norm, residual, out)
        return out

    calls: list[tuple[str, Callable[[Any], Tensor]]] = [
        ("table", functools.partial(node.apply, x, norm=norm, residual=residual, out_dtype=out_dtype))
    ]
    if kind == "linear":
        calls.append(("without norm, by cuBLAS", lambda weight: F.linear(x, weight.weight)))
    if tried:
        calls += [
            (candidate, functools.partial(filled, fill))
            for candidate, fill in variants(kind, rows, n, k, gated)
        ]
    report.candidates(
        f"{kind} {model} {name} {rows}x{n}x{k}",
        calls,
        packed * ceil_div(12, copies),
        reference(kind, x, first, gated, norm, residual),
        moved=moved,
        operations=2 * rows * n * k,
        op=kind,
        model=model,
        name=name,
        n=n,
        k=k,
        rows=rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="0.6B,8B")
    parser.add_argument("--only", default="linear,w8a8,w4a16,w8a16,prep,decode,prefill")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--no-variants", action="store_true", help="only what the table chooses")
    parser.add_argument("--no-pdl", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_kernels.jsonl"))
    args = parser.parse_args()
    report, tried = Report(args.out), not args.no_variants
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if args.no_pdl:
            stack.enter_context(pretend(dataclasses.replace(gpu(torch.device("cuda", 0)), pdl=False)))
        for model, only in itertools.product(args.models.split(","), args.only.split(",")):
            shape, begin = MODELS[model], time.monotonic()
            if only in NODES:
                for rows in map(int, args.rows.split(",")):
                    bench_linear(
                        report, only, model, shape, rows, tried=tried and (rows <= 64 or only == "w8a8")
                    )
            elif only == "prep":
                for tokens in (1, 8, 1024):
                    bench_prep(report, model, shape, tokens)
            elif only == "decode":
                for batch, kv_len in ((1, 160), (1, 1024), (1, 8192), (8, 1024), (32, 1024)):
                    bench_attention(report, model, shape, [1] * batch, kv_len, tried=tried)
            elif only == "prefill":
                for count, kv_len in ((256, 256), (1024, 1024), (2048, 2048), (512, 8192)):
                    bench_attention(report, model, shape, [count], kv_len, tried=tried)
            else:
                parser.error(f"--only {only!r} is none of linear, w8a8, w4a16, w8a16, prep, decode, prefill")
            print(f"-- {model} {only}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
