"""Which block sizes a dense linear runs with: explicit rules over its shape, nothing tried at run time.

They follow benchmarks/gpu_kernels.py; what they aim at is in the comments, so that they can be judged.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pymllm_kernels.triton.launch import ceil_div, power_of_2

MAX_FEW_ROWS = 16
"""Up to so many rows a product is bound by reading its weights; over it cuBLAS computes it."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """block_n: results a program. block_k: columns a step. warps, stages, unroll: of a program and its loop."""

    block_n: int
    block_k: int
    warps: int
    stages: int = 1
    unroll: int = 1


def matvec_blocks(n: int, k: int, sms: int, *, gated: bool) -> Blocks:
    """For one row. n: results, of which each needs two rows of weights where gated."""
    whole = power_of_2(max(k, 64))
    # The whole row in one load where it is short, so that nothing is waited for twice.
    if whole <= 2048 and k == whole:
        block_k = whole
    else:
        block_k = whole if whole <= 1024 else 1024 if k % 1024 == 0 else 512 if k % 512 == 0 else 1024
    matrices = 2 if gated else 1
    # 8 KB in flight a program where a row is short, 16 KB where it is long: with 8 or 4 programs a
    # multiprocessor, more than covers the memory's latency.
    block_n = max((4096 if k <= 2048 else 8192) // (block_k * matrices), 1)
    # Rather small programs than idle multiprocessors: 3 programs for every 2 of them at least.
    while block_n > 1 and 2 * ceil_div(n, block_n) < 3 * sms:
        block_n //= 2
    # Fewer warps have fewer sums to exchange.
    warps = 2 if block_k >= 2048 and block_n <= 2 else 4
    return Blocks(min(block_n, 16), block_k, warps=warps, unroll=min(ceil_div(k, block_k), 4))


def few_rows_blocks(n: int, k: int, sms: int, *, gated: bool) -> Blocks:
    """For 2 to MAX_FEW_ROWS rows. Best of 23 to 117 variants a shape at 8 rows on an H200; see benchmarks/notes.md."""
    if n <= 16 * sms:
        # Few results: small blocks, deep pipelines.
        blocks = Blocks(16, 256, warps=2, stages=6)
    elif gated and n >= 64 * sms:
        blocks = Blocks(64, 64, warps=4, stages=4)
    elif gated:
        blocks = Blocks(32, 256, warps=2, stages=4)
    else:
        blocks = Blocks(64, 256, warps=4, stages=4)
    return dataclasses.replace(blocks, block_k=min(blocks.block_k, power_of_2(max(k, 16))))


def fitted(blocks: Blocks, block_m: int, itemsize: int, shared: int, *, gated: bool) -> Blocks:
    """The blocks with as many stages, then as many columns, as `shared` bytes hold. itemsize: of a weight and of x."""
    rows = blocks.block_n * (2 if gated else 1) + block_m
    # Two stages at least; 4 KB are left for what else the compiler keeps there.
    room = shared - (4 << 10)
    while 2 * rows * blocks.block_k * itemsize > room:
        blocks = dataclasses.replace(blocks, block_k=blocks.block_k // 2)
    return dataclasses.replace(blocks, stages=min(blocks.stages, room // (rows * blocks.block_k * itemsize)))
