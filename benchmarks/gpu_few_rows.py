"""Checks the CUDA kernels for linears of few rows against float64 and times many plans of each, on a GPU.

Each candidate is a chain of calls in a captured CUDA graph, with more weights than the second-level cache holds.
``rules`` is the node, which chooses by its own rules; tuples are `few_rows_library.Plan`: row_tiles, warps, staged,
ahead, blocks. A plan that is not staged includes the launch that norms or quantises x. Several rows of bfloat16 have
no plans here: the node takes those of `some_rows_plan`. Every candidate is appended to the file; the screen shows the
best of them.

    python benchmarks/gpu_few_rows.py [--models 0.6B,4B,8B] [--only linear,w8a8,w4a16] [--rows 1,8] [--group 128]
                                      [--no-variants] [--no-pdl] [--out results.jsonl]
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
from gpu_kernels import BF16, DEVICE, reference, tensors
from gpu_timing import MODELS, Report, Shape, copies_of
from torch import Tensor

from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.cuda.few_rows import CudaLinear, CudaW4A16, CudaW8A8, PackedInt4
from pymllm_kernels.cuda.few_rows_library import MAX_ROWS, MAX_STAGED, UNIT, FewRows, Plan
from pymllm_kernels.cuda.few_rows_plan import most_warps
from pymllm_kernels.triton.launch import ceil_div, gpu, pretend

NODES: dict[str, Callable[[], Any]] = {"linear": CudaLinear, "w8a8": CudaW8A8, "w4a16": CudaW4A16}
FORMATS = {"linear": "bfloat16", "w8a8": "int8", "w4a16": "int4"}


def plans(weights: str, rows: int, n: int, k: int, *, gated: bool) -> Iterator[Plan]:
    """Those to be tried. n: results."""
    sms = gpu(DEVICE).sms
    if weights != "bfloat16":
        yield from tile_plans(weights, rows, k // UNIT[weights], gated=gated)
    if rows > 1 or weights == "int4":
        return
    loops = [(r, a) for r in (1, 2, 4) for a in (2, 4, 8) if (r, a) != (4, 8)]
    for (row_tiles, ahead), warps, turns in itertools.product(loops, (4, 8), (1, 2, 4, 8, None)):
        if turns is None:
            yield Plan(row_tiles, warps, True, ahead)
        elif turns * warps <= 64 and ceil_div(n, row_tiles * warps) > turns * sms:
            yield Plan(row_tiles, warps, True, ahead, turns * sms)


def tile_plans(weights: str, rows: int, units: int, *, gated: bool) -> Iterator[Plan]:
    """Those of the tensor cores. units: of UNIT columns."""
    for staged, row_tiles, warps in itertools.product((True, False), (1, 2, 4), (2, 3, 4, 5, 6, 8, 10, 12)):
        fits = warps <= min(most_warps(rows, row_tiles, weights), units) and (row_tiles > 1 or not gated)
        if fits and (rows <= MAX_STAGED if staged else rows > 1):
            yield Plan(row_tiles, warps, staged)


def sizes_of(shape: Shape, kind: str) -> dict[str, tuple[int, int, bool, bool, bool]]:
    """As `Shape.linears`, with the head where it has a kernel."""
    head = {"head": (shape.vocab, shape.hidden, False, True, False)} if kind == "linear" else {}
    return shape.linears() | head


def bench(
    report: Report,
    kind: str,
    model: str,
    name: str,
    sizes: tuple[int, int, bool, bool, bool],
    rows: int,
    group: int,
    *,
    tried: bool,
) -> None:
    """One projection. sizes: as `Shape.linears` gives them. tried: time the plans, too."""
    total, k, gated, with_norm, with_residual = sizes
    n = total // 2 if gated else total

    def weights_of() -> dict[str, Tensor]:
        made = tensors(kind, total, k)
        if kind == "w4a16":
            made["scale"] = made["scale"].repeat_interleave(128, 1)[:, ::group].contiguous()
        return made

    node, act, first = NODES[kind](), "silu_mul" if gated else None, weights_of()
    moved = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    copies = copies_of(moved)
    packed = [node.pack(dict(first), act=act)]
    packed += [node.pack(weights_of(), act=act) for _ in range(copies - 1)]
    x = torch.randn(rows, k, dtype=BF16, device=DEVICE)
    norm = (torch.rand(k, device=DEVICE).add(0.5).to(BF16), 1e-6) if with_norm else None
    residual = torch.randn(rows, n, dtype=BF16, device=DEVICE) if with_residual else None
    dtype = torch.float32 if name == "head" else BF16
    kernels: FewRows = packed[0].kernels if isinstance(packed[0], PackedInt4) else node._kernels

    def planned(plan: Plan, weight: Any) -> Tensor:
        given: Norm | None = norm
        return kernels(x, weight.own, plan, norm=given, residual=residual, dtype=dtype)

    calls: list[tuple[str, Callable[[Any], Tensor]]] = [
        ("rules", functools.partial(node.apply, x, norm=norm, residual=residual, out_dtype=dtype))
    ]
    if tried:
        calls += [
            (str(dataclasses.astuple(plan)), functools.partial(planned, plan))
            for plan in plans(FORMATS[kind], rows, n, k, gated=gated)
        ]
    report.candidates(
        f"{kind} {model} {name} {rows}x{total}x{k}",
        calls,
        packed * ceil_div(12, copies),
        reference(kind, x, first, gated, norm, residual),
        moved=moved,
        operations=2 * rows * total * k,
        op=kind,
        model=model,
        name=name,
        n=total,
        k=k,
        rows=rows,
        group=group if kind == "w4a16" else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="0.6B,4B,8B")
    parser.add_argument("--only", default="linear,w8a8,w4a16")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--group", type=int, default=128, help="of W4A16: 32, 64 or 128 columns")
    parser.add_argument("--no-variants", action="store_true", help="only what the rules choose")
    parser.add_argument("--no-pdl", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_few_rows.jsonl"))
    args = parser.parse_args()
    kinds, every = args.only.split(","), [int(text) for text in args.rows.split(",")]
    if wrong := [kind for kind in kinds if kind not in NODES]:
        parser.error(f"--only {wrong} is none of {', '.join(NODES)}")
    if wrong := [rows for rows in every if not 1 <= rows <= MAX_ROWS]:
        parser.error(f"--rows {wrong}: the kernels take 1 to {MAX_ROWS}")
    report = Report(args.out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if args.no_pdl:
            stack.enter_context(pretend(dataclasses.replace(gpu(torch.device("cuda", 0)), pdl=False)))
        for model, kind in itertools.product(args.models.split(","), kinds):
            begin = time.monotonic()
            for rows, (name, sizes) in itertools.product(every, sizes_of(MODELS[model], kind).items()):
                bench(report, kind, model, name, sizes, rows, args.group, tried=not args.no_variants)
            print(f"-- {model} {kind}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
