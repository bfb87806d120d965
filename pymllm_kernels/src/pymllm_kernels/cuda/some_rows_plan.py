"""How a product of some rows is launched: explicit rules over its shape, nothing tried at run time.

They follow chains of a layer's four products of Qwen3 0.6B, 4B and 8B with 8 and 16 rows on an H200, in which one plan
was changed at a time (benchmarks/results/gpu_some_rows.jsonl).
"""

from __future__ import annotations

from pymllm_kernels.cuda.some_rows_library import MAX_STAGES, Plan, shared_bytes
from pymllm_kernels.triton.launch import ceil_div

BUSY = 3.8
"""Tiles of 16 rows of the weight, counted for each block that shares their columns, that a multiprocessor should have:
with fewer, too little is on its way."""

LARGEST, TOGETHER = 200 << 10, 216 << 10
"""Bytes of shared memory of a block at most, and of all blocks of a multiprocessor, which should all find room at once."""


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
    splits = _splits(units, n, k, sms, gated=gated) if clusters else 1
    run = k // splits
    if run < 2048 or (gated and not clusters):
        warps = 3 if n > k and not gated else 2
    elif n > k:
        warps = 3
    else:
        # One large block a multiprocessor.
        warps = min(max(ceil_div(units * splits, sms), 2), 6)
    block_k = 64 if k % 128 or run < 1024 or (gated and run < 2048) else 128
    blocks = ceil_div(ceil_div(units, warps) * splits, sms)
    room = min(LARGEST, shared, min(TOGETHER, shared) // min(blocks, 4))
    # One more than there are chunks: all are asked for before x is there.
    most = min(MAX_STAGES, max(ceil_div(run, block_k) + 1, 2))
    for stages in range(most, 1, -1):
        plan = Plan(warps, block_k, stages, splits)
        if shared_bytes(rows, plan, gated=gated, norm=normed) <= room:
            return plan
    return Plan(warps, 64, 2, splits)


def _splits(units: int, n: int, k: int, sms: int, *, gated: bool) -> int:
    """Blocks of a cluster that share the columns."""
    if units >= 16 * sms:
        return 1
    if n > k:
        return 2 if k >= (2048 if gated else 4096) else 4
    splits = 1
    while splits < 8 and units * splits < BUSY * sms:
        splits *= 2
    return splits
