"""Compiles what a Qwen3 model launches for GPUs that need not be there, and writes down what it takes.

    python benchmarks/triton_resources.py [--models 0.6B,8B] [--capabilities 8.0,8.7,9.0] [--rows 1,8,512]
                                          [--json] [--write docs/reference/gpu-kernels.md]

Prints a Markdown table (or one JSON object a launch): registers a thread, shared memory a block, bytes
spilled. Ends with an error where a launch spills much or asks for more shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import torch
from gpu_timing import MODELS, Shape
from torch import Tensor

from pymllm_core.nn.step_ops import DecodeState
from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV
from pymllm_kernels.triton.aot import Compiled, recorded
from pymllm_kernels.triton.attention import TritonAttention
from pymllm_kernels.triton.attention_prep import TritonAttentionPrep
from pymllm_kernels.triton.embedding import triton_embedding
from pymllm_kernels.triton.greedy_step import TritonGreedyStep
from pymllm_kernels.triton.launch import LEAST_SHARED, SHARED
from pymllm_kernels.triton.linear import TritonLinear
from pymllm_kernels.triton.w4a16 import TritonW4A16
from pymllm_kernels.triton.w8a8 import TritonW8A8
from pymllm_kernels.triton.w8a16 import TritonW8A16

SMS = {(8, 0): 108, (8, 6): 82, (8, 7): 16, (8, 9): 128, (9, 0): 132}
"""Streaming multiprocessors of an A100, an RTX 3090, a Jetson AGX Orin, an RTX 4090 and an H100 or H200."""
SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_U", "BLOCK", "SPLITS", "STAGES", "GATED")
SPILLS = 64
"""Bytes a thread that are let pass: a few values, kept over a long loop."""


def nothing(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linears(shape: Shape, rows: int) -> None:
    for n, k, gated, with_norm, with_residual in shape.linears().values():
        x, act = nothing(rows, k), "silu_mul" if gated else None
        norm = (nothing(k), 1e-6) if with_norm else None
        residual = nothing(rows, n) if with_residual else None
        for node, tensors in (
            (TritonLinear(), {"weight": nothing(n, k)}),
            (
                TritonW8A8(),
                {
                    "weight": nothing(n, k, dtype=torch.int8),
                    "weight_scale": nothing(n, dtype=torch.float32),
                },
            ),
            (
                TritonW4A16(),
                {"weight": nothing(n, k // 2, dtype=torch.uint8), "scale": nothing(n, k // 128)},
            ),
            (TritonW8A16(), {"weight": nothing(n, k, dtype=torch.int8), "scale": nothing(n, 1)}),
        ):
            node.apply(x, node.pack(tensors, act=act), norm=norm, residual=residual)


def attention(shape: Shape, rows: int) -> None:
    """Preparation; decode where rows is small, else a prompt of so many tokens."""
    dim, meta = shape.dim, torch.device("meta")
    config = AttentionConfig(shape.heads, shape.kv_heads, dim, 16, dim**-0.5, torch.bfloat16, meta)
    backend = TritonAttention(config)
    kv = LayerKV(nothing(4096, shape.kv_heads, dim), nothing(4096, shape.kv_heads, dim))
    queries = [1] * rows if rows <= 16 else [rows]
    numbers = nothing(rows, dtype=torch.int64)
    lengths = nothing(len(queries) + 1, dtype=torch.int32)
    table = nothing(len(queries), 256, dtype=torch.int32)
    decodes = rows if rows <= 16 else 0
    ctx = ForwardContext(
        numbers, numbers, lengths, lengths, table, decodes, queries, queries, 16, [kv], backend
    )
    backend.plan(ctx)
    qkv = nothing(rows, (shape.heads + 2 * shape.kv_heads) * dim)
    angles, weight = nothing(4096, dim, dtype=torch.float32), nothing(dim)
    q = TritonAttentionPrep()(qkv, numbers, angles, weight, weight, 1e-6, numbers, kv.k, kv.v)
    backend.attend(q, kv, ctx)
    if decodes:
        backend.prepare_and_attend(qkv, angles, weight, weight, 1e-6, kv, ctx)


def end_of_step(rows: int) -> None:
    """The greedy choice among Qwen3's logits."""
    numbers, lengths = nothing(rows, dtype=torch.int64), nothing(rows, dtype=torch.int32)
    table, chosen = nothing(rows, 256, dtype=torch.int32), nothing(4, rows, dtype=torch.int64)
    turn = nothing(1, dtype=torch.int32)
    state = DecodeState(numbers, numbers, numbers, lengths, lengths, table, 16, chosen, turn)
    TritonGreedyStep()(nothing(rows, 151936, dtype=torch.float32), state)


def line(capability: tuple[int, int], model: str, rows: int, launch: Compiled) -> str:
    sizes = ", ".join(
        f"{name.lower().removeprefix('block_')} {launch.constants[name]}"
        for name in SIZES
        if name in launch.constants and launch.constants[name] is not False
    )
    grid = " x ".join(map(str, launch.grid))
    return (
        f"| {capability[0]}.{capability[1]} | {model} | {rows} | `{launch.kernel.removesuffix('_kernel')}` | {sizes} "
        f"| {grid} | {launch.warps} | {launch.registers} | {launch.shared} | {launch.spills} |"
    )


HEAD = """# Resources of the GPU kernels

Made by `python benchmarks/triton_resources.py --write docs/reference/gpu-kernels.md`: what Triton's compiler and
ptxas say of every launch of a decode of 1 and of 8 rows, and of a prompt of 512 tokens, with the block sizes that
the package chooses for an A100 (8.0, 108 multiprocessors), a Jetson AGX Orin (8.7, 16) and an H100 or H200
(9.0, 132). Nothing is run. Registers and spilled bytes are of a thread, shared memory in bytes of a block, which
may have 166912 at 8.0 and 8.7, and 232448 at 9.0.

| capability | model | rows | kernel | blocks | grid | warps | registers | shared | spilled |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="0.6B,8B")
    parser.add_argument("--capabilities", default="8.0,8.7,9.0")
    parser.add_argument("--rows", default="1,8,512")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    lines, bad = [], []
    for wanted in args.capabilities.split(","):
        capability = (int(wanted[0]), int(wanted[2]))
        for model, rows in itertools.product(args.models.split(","), map(int, args.rows.split(","))):
            with recorded(capability=capability, sms=SMS[capability]) as launches:
                hidden = MODELS[model].hidden
                triton_embedding(nothing(rows, dtype=torch.int64), nothing(151936, hidden))
                linears(MODELS[model], rows)
                attention(MODELS[model], rows)
                if rows <= 16:
                    end_of_step(rows)
            seen = set()
            for launch in launches:
                text = line(capability, model, rows, launch)
                if launch.shared > SHARED.get(capability, LEAST_SHARED) or launch.spills > SPILLS:
                    bad.append(text)
                if text not in seen:
                    seen.add(text)
                    lines.append(text)
                    fields = {"capability": wanted, "model": model, "rows": rows} | dataclasses.asdict(launch)
                    del fields["ptx"]
                    print(json.dumps(fields) if args.json else text, flush=True)
    if args.write:
        args.write.write_text(HEAD + "\n".join(lines) + "\n")
    if bad:
        raise SystemExit("these launches take too much:\n" + "\n".join(bad))


if __name__ == "__main__":
    main()
