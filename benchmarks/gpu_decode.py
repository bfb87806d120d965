"""Times the attention of decodes: Triton's kernel beside the one in CUDA C++, which is checked against it.

    python benchmarks/gpu_decode.py [--models 0.6B,8B] [--few] [--many] [--tune] [--out results.jsonl]

Each figure is the median of replays of a CUDA graph in which every call reads another layer's cache. ``chain`` is
what attention adds to a chain of the products before and after it; ``alone`` one attention after another.
--tune: more ways to divide the cache than the package's own choice.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_attention import context
from gpu_timing import MODELS, Report, Shape, copies_of, graph_us, rel_error
from torch import Tensor

from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV
from pymllm_kernels.cuda.decode_attention import CudaAttention
from pymllm_kernels.cuda.decode_plan import Split
from pymllm_kernels.cuda.few_rows import CudaLinear
from pymllm_kernels.triton.attention import TritonAttention

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
WIDTH = 40960
"""Tokens that a sequence may grow to: the page table's width, as in a captured step."""


class Pass:
    """A step's decodes over several layers."""

    def __init__(self, shape: Shape, kv_lens: list[int]) -> None:
        self.shape = shape
        self.config = AttentionConfig(
            shape.heads, shape.kv_heads, shape.dim, 16, shape.dim**-0.5, BF16, DEVICE
        )
        self.moved = sum(kv_lens) * shape.kv_heads * shape.dim * 4
        self.layers = max(min(copies_of(self.moved), shape.layers), 3)
        count = len(kv_lens)
        slots = sum(-(-n // 16) for n in kv_lens) * 16 + 16
        self.kv = [
            LayerKV(
                *(torch.randn(slots, shape.kv_heads, shape.dim, dtype=BF16, device=DEVICE) for _ in range(2))
            )
            for _ in range(self.layers)
        ]
        self.triton = TritonAttention(self.config)
        self.ours = CudaAttention(self.config)
        self.ctx: ForwardContext = context([1] * count, kv_lens, self.triton, slots)
        table = torch.zeros(count, WIDTH // 16, dtype=torch.int32, device=DEVICE)
        order, first = torch.randperm(slots // 16).int(), 0
        for row, length in enumerate(kv_lens):
            pages = -(-length // 16)
            table[row, :pages] = order[first : first + pages].to(DEVICE)
            first += pages
        ctx = self.ctx
        ctx.page_table = table
        ctx.positions = ctx.kv_lens.long() - 1
        rows = torch.arange(count, device=DEVICE)
        ctx.slots = table[rows, ctx.positions // 16].long() * 16 + ctx.positions % 16
        self.qkv = torch.randn(
            count, (shape.heads + 2 * shape.kv_heads) * shape.dim, dtype=BF16, device=DEVICE
        )
        angles = torch.randn(WIDTH, shape.dim // 2, device=DEVICE)
        self.table = torch.cat((angles.cos(), angles.sin()), dim=1)
        self.weights = [torch.randn(shape.dim, dtype=BF16, device=DEVICE) for _ in range(2)]
        self.triton.plan(ctx)
        self.ours.plan(ctx)

    def attention(self, backend: Any, qkv: Tensor, layer: int, **how: Any) -> Tensor:
        rest = (self.table, *self.weights, 1e-6, self.kv[layer], self.ctx)
        out: Tensor = backend.prepare_and_attend(qkv, *rest, **how)
        return out

    def ways(self, tune: list[Split]) -> dict[str, Callable[[Tensor, int], Tensor]]:
        found = {"triton": functools.partial(self.attention, self.triton)}
        found["cuda"] = functools.partial(self.attention, self.ours)
        for split in tune:
            found[str(split)[5:]] = functools.partial(self.attention, self.ours, split=split)
        return found


def show(report: Report, op: str, name: str, way: str, us: float, moved: int, error: float) -> None:
    report.row(us, moved=moved, op=op, case=name, candidate=way, error=error)
    wrong = "" if error < 0.02 else f"WRONG {error:.3f}"
    print(f"{op} {name} {way:52} {us:9.2f} us {moved / us / 1e3:6.0f} GB/s {wrong}", flush=True)


def alone(report: Report, name: str, shape: Shape, kv_lens: list[int], tune: list[Split]) -> None:
    work = Pass(shape, kv_lens)
    reference: Tensor | None = None
    for way, call in work.ways(tune).items():
        try:
            out = call(work.qkv, 0)
            reference = out.double() if reference is None else reference
            error = rel_error(out, reference)
            us = graph_us(
                [functools.partial(call, work.qkv, layer) for layer in range(work.layers)], repeats=5
            )
        except Exception as problem:
            print(f"{name} {way}: {type(problem).__name__}: {problem}")
            if "CUDA" in type(problem).__name__ or "Accelerator" in type(problem).__name__:
                sys.exit(1)
            continue
        show(report, "alone", name, way, us, work.moved, error)


def chain(report: Report, name: str, shape: Shape, kv_lens: list[int], tune: list[Split]) -> None:
    """x -> qkv -> attention -> o -> x, each layer with weights of its own."""
    work, count, node = Pass(shape, kv_lens), len(kv_lens), CudaLinear()
    width = shape.heads * shape.dim
    sizes = (((shape.heads + 2 * shape.kv_heads) * shape.dim, shape.hidden), (shape.hidden, width))
    packed = [
        [
            node.pack({"weight": torch.randn(n, k, dtype=BF16, device=DEVICE) * k**-0.5}, act=None)
            for n, k in sizes
        ]
        for _ in range(work.layers)
    ]
    x = torch.randn(count, shape.hidden, dtype=BF16, device=DEVICE)
    gain = torch.ones(shape.hidden, dtype=BF16, device=DEVICE)

    def run(call: Callable[[Tensor, int], Tensor] | None) -> Tensor:
        y = x
        for layer, (qkv, o) in enumerate(packed):
            z = node.apply(y, qkv, norm=(gain, 1e-6))
            z = z[:, :width] if call is None else call(z, layer).view(count, width)
            y = node.apply(z, o, residual=y)
        return y

    without = graph_us([functools.partial(run, None)]) / work.layers
    report.row(without, op="chain", case=name, candidate="without attention")
    print(f"chain {name} without attention {without:.2f} us a layer")
    for way, call in work.ways(tune).items():
        try:
            us = graph_us([functools.partial(run, call)]) / work.layers - without
        except Exception as problem:
            print(f"{name} {way}: {type(problem).__name__}: {problem}")
            continue
        show(report, "chain", name, way, us, work.moved, 0.0)


FEW = [
    Split(16),
    Split(16, cluster=2),
    Split(16, cluster=4),
    Split(16, cluster=16),
    Split(4, cluster=4),
    Split(1, warps=8),
    Split(16, least=2, warps=8),
    Split(8, least=2, warps=8),
    Split(2, least=2, warps=8),
    Split(16, cluster=2, warps=8),
    Split(8, cluster=2, warps=8),
    Split(8, cluster=4, warps=8),
    Split(2, cluster=2, warps=8),
    Split(4, least=4),
    Split(4, cluster=2, least=4),
    Split(16, least=4),
]
MANY = [
    Split(1),
    Split(4, least=8),
    Split(4, least=16),
    Split(4, least=24),
    Split(4, least=32),
    Split(4, least=8, cluster=2),
    Split(2, cluster=2),
    Split(2, least=4, cluster=2),
    Split(8, least=8, cluster=2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="0.6B,8B")
    parser.add_argument("--few", action="store_true", help="one to 32 sequences")
    parser.add_argument("--many", action="store_true", help="64 to 256 sequences of 100 to 2048 tokens")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu_decode.jsonl"))
    arguments = parser.parse_args()
    report = Report(arguments.out)
    generator = torch.Generator().manual_seed(0)
    for model in arguments.models.split(","):
        shape = MODELS[model]
        if arguments.few:
            for batch, length in ((1, 1), (1, 128), (1, 256), (1, 2048), (1, 16384), (8, 256), (8, 2048)):
                chain(
                    report,
                    f"{model} {batch}x{length}",
                    shape,
                    [length] * batch,
                    FEW if arguments.tune else [],
                )
            for batch, length in ((32, 256), (128, 256)):
                alone(
                    report,
                    f"{model} {batch}x{length}",
                    shape,
                    [length] * batch,
                    FEW if arguments.tune else [],
                )
        if arguments.many:
            for batch in (32, 64, 128, 256):
                lengths = torch.randint(100, 2048, (batch,), generator=generator).tolist()
                tune = MANY if arguments.tune else []
                alone(report, f"{model} {batch}x100..2048 as they come", shape, lengths, tune)
                # As the scheduler has them.
                alone(report, f"{model} {batch}x100..2048", shape, sorted(lengths, reverse=True), tune)


if __name__ == "__main__":
    main()
