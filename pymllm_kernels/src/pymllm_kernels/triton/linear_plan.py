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
    """For one row. n: results, of which each needs two rows of weights where gated.

    Best of 4 to 10 variants for each linear of 0.6B and 8B on an H200; see benchmarks/notes.md.
    """
    if k <= 1024:
        blocks = Blocks(2 if gated else 4, power_of_2(max(k, 64)), warps=2)
    elif k <= 2048:
        blocks = Blocks(2, 2048, warps=2)
    elif k <= 4096 and (gated or k < 4096):
        # The whole row in one load, so that nothing is waited for twice.
        blocks = Blocks(2 if gated else 1, 4096, warps=8 if gated else 4)
    elif k % 2048 == 0 and k > 4096:
        blocks = Blocks(4, 2048, warps=8, unroll=2)
    elif k % 1024 == 0:
        blocks = Blocks(4, 1024, warps=4, unroll=2)
    else:
        blocks = Blocks(4 if gated else 8, 512, warps=4, unroll=2)
    # Rather small programs than idle multiprocessors.
    while blocks.block_n > 1 and 2 * ceil_div(n, blocks.block_n) < 3 * sms:
        blocks = dataclasses.replace(blocks, block_n=blocks.block_n // 2)
    return blocks


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
