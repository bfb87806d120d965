"""Routed experts on a GPU, for the sizes of Qwen3-30B-A3B, checked against float64 and timed.

    python benchmarks/gpu_moe.py [--tokens 1,2,4,8,16,64,512,4096] [--out benchmarks/results/gpu_moe.jsonl]

Each row is the whole of a layer's experts (routing, both products, the sum) inside a captured graph, with
weights that are cold. Bytes are those of the experts that the tokens were given. `few` and `grouped` run one
path whatever the number of tokens: where they cross is `moe_plan.MAX_FEW_TOKENS`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_timing import Report
from torch import Tensor

from pymllm_core.nn.moe_ops import moe_experts
from pymllm_core.nn.quant_ops import dequantize, unpack_int4
from pymllm_kernels.triton import moe as paths
from pymllm_kernels.triton.moe import TritonExperts, TritonInt4Experts, TritonInt8Experts
from pymllm_kernels.triton.moe_route import triton_route
from pymllm_kernels.triton.moe_w8a8 import TritonW8A8Experts

DEVICE, BF16 = torch.device("cuda"), torch.bfloat16
EXPERTS, TOP_K, HIDDEN, WIDTH = 128, 8, 2048, 768
FORMATS: dict[str, tuple[Any, int, int | None]] = {
    "bf16": (TritonExperts, 16, None),
    "w4a16 g128": (TritonInt4Experts, 4, 128),
    "w4a16 g32": (TritonInt4Experts, 4, 32),
    "w8a16": (TritonInt8Experts, 8, None),
    "w8a8": (TritonW8A8Experts, 8, None),
}
COPIES = 2
"""Layers that are rotated through: one layer's experts are larger than any second-level cache."""


def weights(n: int, k: int, bits: int, group: int | None) -> dict[str, Tensor]:
    """The stacked tensors of one projection, for each format that has weights of so many bits."""
    if bits == 16:
        return {"weight": (torch.randn(EXPERTS, n, k, device=DEVICE, dtype=BF16) * k**-0.5)}
    dtype, low, high = (torch.uint8, 0, 256) if bits == 4 else (torch.int8, -127, 128)
    codes = torch.randint(low, high, (EXPERTS, n, k * bits // 8), device=DEVICE, dtype=dtype)
    groups = k // (group or k)
    scale = (torch.rand(EXPERTS, n, groups, device=DEVICE) + 0.5) / ((1 << (bits - 1)) * k**0.5)
    return {"weight": codes, "scale": scale.to(BF16), "weight_scale": scale[..., 0].contiguous()}


def wide(tensors: dict[str, Tensor], k: int, bits: int, expert: int) -> Tensor:
    """One expert's weight in float64."""
    weight = tensors["weight"][expert]
    if bits == 16:
        return weight.double()
    codes = unpack_int4(weight, k) if bits == 4 else weight
    return dequantize(codes, tensors["scale"][expert].double())


def expected_rows(
    x: Tensor, logits: Tensor, up: dict[str, Tensor], down: dict[str, Tensor], bits: int
) -> Tensor:
    """The first two tokens in float64, by the definition over the experts that they were given."""
    shares, ids = triton_route(logits[:2], TOP_K, True)
    used, where = ids.unique(return_inverse=True)
    gate_up = torch.stack([wide(up, HIDDEN, bits, int(expert)) for expert in used])
    out = torch.stack([wide(down, WIDTH, bits, int(expert)) for expert in used])
    return moe_experts(x[:2].double(), shares, where, gate_up, out)


def forced(call: Callable[[Any], Tensor], most: int) -> Callable[[Any], Tensor]:
    """`call` with another limit between the paths."""

    def run(item: Any) -> Tensor:
        with mock.patch.dict(paths.MAX_FEW_TOKENS, dict.fromkeys(paths.MAX_FEW_TOKENS, most)):
            return call(item)

    return run


def bench(report: Report, name: str, tokens: int) -> None:
    make, bits, group = FORMATS[name]
    kernel = make()
    x = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=BF16)
    logits = torch.randn(tokens, EXPERTS, device=DEVICE) * 2
    items, expected = [], None
    for _ in range(COPIES):
        up, down = weights(2 * WIDTH, HIDDEN, bits, group), weights(HIDDEN, WIDTH, bits, group)
        if expected is None and name != "w8a8":
            expected = expected_rows(x, logits, up, down, bits)
        items.append(kernel.pack(up, down))
    used = len(triton_route(logits, TOP_K, True)[1].unique())
    parameters = 3 * HIDDEN * WIDTH

    def run(packed: Any) -> Tensor:
        return experts_alone(kernel, x, *triton_route(logits, TOP_K, True), packed)

    calls: list[tuple[str, Callable[[Any], Tensor]]] = [("table", run)]
    if name != "w8a8" and tokens <= 64:
        calls += [("few", forced(run, 1 << 20)), ("grouped", forced(run, 0))]
    shares, ids = triton_route(logits, TOP_K, True)
    calls.append(("without routing", functools.partial(experts_alone, kernel, x, shares, ids)))
    report.candidates(
        f"{name}, {tokens} tokens, {used} experts",
        calls,
        items,
        expected,
        moved=used * parameters * bits // 8,
        operations=2 * tokens * TOP_K * parameters,
        op="experts",
        format=name,
        tokens=tokens,
        experts=used,
    )


def experts_alone(kernel: Any, x: Tensor, shares: Tensor, ids: Tensor, packed: Any) -> Tensor:
    out: Tensor = kernel.apply(x, shares, ids, packed)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,2,4,8,16,64,512,4096")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_moe.jsonl"))
    options = parser.parse_args()
    torch.manual_seed(0)
    report = Report(options.out)
    for name in options.formats.split(","):
        for tokens in map(int, options.tokens.split(",")):
            bench(report, name, tokens)


if __name__ == "__main__":
    main()
