"""Times whole decode steps of the Triton kernels: all layers and the head in one captured CUDA graph.

Random weights, every layer its own, the nodes as the model calls them; no embedding, no sampling. The floor is
what must be read (weights, cache) at the measured 4.56 TB/s of an H200.

    python benchmarks/gpu_step.py [--models 0.6B,4B,8B] [--formats linear,w8a8,w4a16] [--batches 1,8,32]
                                  [--context 256] [--head w8a16] [--no-pdl] [--out results.jsonl]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from gpu_attention import context
from gpu_kernels import BF16, DEVICE, NODES, tensors
from gpu_timing import MODELS, Report, Shape, replay_us
from torch import Tensor

from pymllm_core.protocols.attention import AttentionConfig, LayerKV
from pymllm_kernels.triton.attention import TritonAttention
from pymllm_kernels.triton.attention_prep import TritonAttentionPrep
from pymllm_kernels.triton.launch import gpu, pretend


class Model:
    """All weights of one model in one format, the head's may be another."""

    def __init__(self, shape: Shape, kind: str, head: str) -> None:
        self.node, self.head_node, self.bytes = NODES[kind], NODES[head], 0
        self.layers = [
            {name: self._pack(kind, n, k, gated) for name, (n, k, gated, *_) in shape.linears().items()}
            for _ in range(shape.layers)
        ]
        self.head = self._pack(head, shape.vocab, shape.hidden, False)
        self.norm = (torch.ones(shape.hidden, dtype=BF16, device=DEVICE), 1e-6)
        self.head_norm = torch.ones(shape.dim, dtype=BF16, device=DEVICE)

    def _pack(self, kind: str, n: int, k: int, gated: bool) -> Any:
        weights = tensors(kind, n, k)
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        return NODES[kind].pack(weights, act="silu_mul" if gated else None)


def step(model: Model, x: Tensor, ctx: Any, prep: TritonAttentionPrep, table: Tensor) -> Tensor:
    apply, norm = model.node.apply, model.norm
    for layer, kv in zip(model.layers, ctx.kv, strict=True):
        qkv = apply(x, layer["qkv"], norm=norm)
        q = prep(qkv, ctx.positions, table, model.head_norm, model.head_norm, 1e-6, ctx.slots, kv.k, kv.v)
        attended = ctx.attention.attend(q, kv, ctx).view(x.shape[0], -1)
        x = apply(attended, layer["o"], residual=x)
        x = apply(apply(x, layer["gate_up"], norm=norm), layer["down"], residual=x)
    return model.head_node.apply(x, model.head, norm=norm, out_dtype=torch.float32)


def bench(
    report: Report, name: str, shape: Shape, kind: str, head: str, batches: list[int], kv_len: int
) -> None:
    model = Model(shape, kind, head)
    prep = TritonAttentionPrep()
    table = torch.randn(kv_len + 1, shape.dim, device=DEVICE)
    for batch in batches:
        backend = TritonAttention(
            AttentionConfig(shape.heads, shape.kv_heads, shape.dim, 16, shape.dim**-0.5, BF16, DEVICE)
        )
        slots = batch * (kv_len + 16) // 16 * 16 + 1600
        ctx = context([1] * batch, [kv_len] * batch, backend, slots)
        ctx.kv = [
            LayerKV(
                *(torch.randn(slots, shape.kv_heads, shape.dim, dtype=BF16, device=DEVICE) for _ in range(2))
            )
            for _ in range(shape.layers)
        ]
        x = torch.randn(batch, shape.hidden, dtype=BF16, device=DEVICE)
        backend.plan(ctx)
        step(model, x, ctx, prep, table)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(model, x, ctx, prep, table)
        us = replay_us(graph, repeats=20)
        moved = model.bytes + batch * kv_len * shape.kv_heads * shape.dim * 4 * shape.layers
        floor = moved / 4.56e6
        finite = bool(logits.isfinite().all())
        report.row(
            us,
            moved=moved,
            op="step",
            model=name,
            format=kind,
            head=head,
            batch=batch,
            context=kv_len,
            finite=finite,
        )
        print(
            f"{name} {kind:6} head {head} batch {batch:3} context {kv_len}: {us / 1e3:7.3f} ms, "
            f"floor {floor / 1e3:.3f} ms, {floor / us:.0%} of it{'' if finite else ', NOT FINITE'}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="0.6B,4B,8B")
    parser.add_argument("--formats", default="linear,w8a8,w4a16")
    parser.add_argument("--head", default="linear", choices=["linear", "w8a16"])
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--no-pdl", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_step.jsonl"))
    args = parser.parse_args()
    report = Report(args.out)
    batches = [int(batch) for batch in args.batches.split(",")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if args.no_pdl:
            stack.enter_context(pretend(dataclasses.replace(gpu(torch.device("cuda", 0)), pdl=False)))
        for name, kind in itertools.product(args.models.split(","), args.formats.split(",")):
            bench(report, name, MODELS[name], kind, args.head, batches, args.context)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
