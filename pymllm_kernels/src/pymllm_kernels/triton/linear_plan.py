"""Which block sizes a dense linear runs with: explicit rules over its shape, nothing tried at run time.

They follow benchmarks/gpu_kernels.py; what they aim at is in the comments, so that they can be judged.
"""

from __future__ import annotations

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
    # The whole row in one load, two where it is long, so that nothing is waited for twice.
    block_k = whole if whole <= 1024 else 1024 if k % 1024 == 0 else 512 if k % 512 == 0 else 1024
    matrices = 2 if gated else 1
    # 16 KB in flight a program: with 4 programs a multiprocessor, twice what covers the memory's latency.
    block_n = max(8192 // (block_k * matrices), 1)
    # Rather small programs than idle multiprocessors: 3 programs for every 2 of them at least.
    while block_n > 1 and 2 * ceil_div(n, block_n) < 3 * sms:
        block_n //= 2
    return Blocks(min(block_n, 16), block_k, warps=4, unroll=min(ceil_div(k, block_k), 4))


def few_rows_blocks(n: int, k: int, sms: int, *, gated: bool, shared: int) -> Blocks:
    """For 2 to MAX_FEW_ROWS rows. shared: bytes of shared memory that a program may have."""
    matrices = 2 if gated else 1
    # The largest blocks that give two of five multiprocessors a program: 64 KB in flight each read as fast as more
    # programs with less. Few results take small blocks and deep pipelines.
    block_n = next((size for size in (64, 32) if 5 * ceil_div(n, size) >= 2 * sms), 16)
    if gated and ceil_div(n, block_n) < sms:
        block_n = min(block_n, 32)
    block_k = 64 if block_n * matrices > 64 else 256
    block_k = min(block_k, power_of_2(max(k, 16)))
    stages = 6 if block_n == 16 else 4
    while stages > 2 and stages * (block_n * matrices + 16) * block_k * 2 > shared:
        stages -= 1
    return Blocks(block_n, block_k, warps=2 if block_n * matrices <= 16 else 4, stages=stages)
