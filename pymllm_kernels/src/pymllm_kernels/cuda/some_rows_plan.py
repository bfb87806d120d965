"""How a product of some rows is launched: explicit rules over its shape, nothing tried at run time.

They follow chains of a layer's four products of Qwen3 0.6B, 4B and 8B with 8 and 16 rows on an H200, in which one plan
was changed at a time, and decode steps with them (benchmarks/results/gpu_some_rows.jsonl).
"""

from __future__ import annotations

from pymllm_kernels.cuda.some_rows_library import MAX_STAGES, Plan, shared_bytes
from pymllm_kernels.triton.launch import ceil_div

BUSY = 3.8
"""Tiles of 16 rows of the weight, counted for each block that shares their columns, that a multiprocessor should have:
with fewer, too little is on its way."""

MANY = 16
"""So many tiles a multiprocessor are several rounds of blocks, whatever their size."""

LARGEST, LARGEST_OF_FOUR = 150 << 10, 104 << 10
"""Bytes of shared memory of a block at most. Of clusters of four and more, for which room must be on as many
multiprocessors at the same time, less: 4B with 8 sequences takes 2.62 ms a step instead of 2.77."""

RESERVED = 1 << 10
"""Bytes of a multiprocessor's shared memory that the device keeps for itself for each block."""

FOR_ATTENTION = 28 << 10
"""What is left of a multiprocessor's shared memory for the blocks of attention, which follows the projection to
queries, keys and values and reads the cache early: 4B with 8 sequences takes 2.78 ms a step instead of 2.95."""


def some_rows_plan(
    rows: int,
    n: int,
    k: int,
    sms: int,
    *,
    gated: bool,
    normed: bool,
    shared: int = 227 << 10,
    clusters: bool = True,
) -> Plan:
    """For up to MAX_ROWS rows. n: results. K: a multiple of 64.

    shared: bytes that a block may have. clusters: whether blocks can share columns: capability 9.0.
    """
    units = ceil_div(n, 16)
    splits = _splits(rows, n, k, sms, gated=gated) if clusters else 1
    while True:
        run = k // splits
        wide = run >= (2048 if gated else 1024) and k % 128 == 0
        if units >= MANY * sms:
            warps = 4
        elif n > k:
            warps = 4 if gated and not wide else 3
        else:
            # Small blocks for short runs; for long ones a large block a multiprocessor.
            warps = 2 if run < 2048 else min(max(ceil_div(units * splits, sms), 2), 6)
        # All blocks should find room at once; where they cannot, two of each multiprocessor's.
        blocks = 2 if units >= MANY * sms else ceil_div(ceil_div(units, warps) * splits, sms)
        together = shared + RESERVED - (FOR_ATTENTION if n > k and not gated else 0)
        room = min(LARGEST if splits <= 2 else LARGEST_OF_FOUR, together // blocks - RESERVED)
        block_k, least = (128, 2) if wide else (64, 4)
        for stages in range(min(MAX_STAGES, max(ceil_div(run, block_k), 2)), 1, -1):
            plan = Plan(warps, block_k, stages, splits)
            fits = shared_bytes(rows, plan, gated=gated, norm=normed) <= room
            if fits and (stages >= least or splits == 1):
                return plan
        if splits == 1:
            return Plan(2, 64, 2)
        splits //= 2


def _splits(rows: int, n: int, k: int, sms: int, *, gated: bool) -> int:
    """Blocks of a cluster that share the columns."""
    units = ceil_div(n, 16)
    if units >= MANY * sms:
        return 1
    if n > k:
        return 2 if (k >= 2048 if gated else k >= 4096 and rows <= 8) else 4
    splits = 1
    while splits < 8 and units * splits < BUSY * sms:
        splits *= 2
    return splits
