"""Compiles the kernels of routed experts for GPUs that are not there; run by test_triton_moe_aot.

    python moe_aot.py CAPABILITY SMS        # e.g. 87 16

In a process of its own: Triton's interpreter, in which the other tests run, is chosen when Triton is imported.
Prints one JSON object for each kernel that a layer of Qwen3-30B-A3B launches.
"""

from __future__ import annotations

import json
import sys

import torch

from pymllm_kernels.triton import aot
from pymllm_kernels.triton.moe import ExpertWeights, Packed, TritonExperts
from pymllm_kernels.triton.moe_route import triton_route
from pymllm_kernels.triton.moe_w8a8 import Int8Experts, TritonW8A8Experts

EXPERTS, HIDDEN, WIDTH, TOP_K = 128, 2048, 768, 8
# Bits, group, symmetric; and the numbers of tokens, for which kernels and blocks differ.
FORMATS = (
    (16, None, True, (1, 4, 8, 512, 4096)),
    (4, 128, False, (1, 8, 4096)),
    (4, 32, True, (1, 8)),
    (8, None, True, (1, 8, 4096)),
)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights(n: int, k: int, bits: int, group: int | None, symmetric: bool) -> ExpertWeights:
    if bits == 16:
        return ExpertWeights(meta(EXPERTS, n, k), None, None, k, k, bits)
    groups = k // (group or k)
    codes = meta(EXPERTS, n, k * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
    zero_point = None if symmetric else meta(EXPERTS, n, groups, dtype=torch.int8)
    return ExpertWeights(codes, meta(EXPERTS, n, groups), zero_point, k, k // groups, bits)


def main(capability: int, sms: int) -> None:
    with aot.recorded(capability=(capability // 10, capability % 10), sms=sms) as launches:
        for bits, group, symmetric, numbers in FORMATS:
            gate_up = weights(2 * WIDTH, HIDDEN, bits, group, symmetric)
            down = weights(HIDDEN, WIDTH, bits, group, symmetric)
            for tokens in numbers:
                x, logits = meta(tokens, HIDDEN), meta(tokens, EXPERTS, dtype=torch.float32)
                shares, ids = triton_route(logits, TOP_K, True)
                TritonExperts().apply(x, shares, ids, Packed(gate_up, down), residual=x)
                if bits == 8:
                    w8a8 = [
                        Int8Experts(w.weight, meta(*w.weight.shape[:2], dtype=torch.float32))
                        for w in (gate_up, down)
                    ]
                    TritonW8A8Experts().apply(x, shares, ids, (w8a8[0], w8a8[1]), residual=x)
    for made in launches:
        print(
            json.dumps(
                {
                    "kernel": made.kernel,
                    "warps": made.warps,
                    "shared": made.shared,
                    "registers": made.registers,
                    "spills": made.spills,
                    **made.constants,
                }
            )
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
