"""How a product of some rows is launched: explicit rules over its shape, nothing tried at run time.

Not measured yet: what they aim at is in the comments.
"""

from __future__ import annotations

from pymllm_kernels.cuda.some_rows_library import MAX_STAGES, Plan, most_warps, shared_bytes
from pymllm_kernels.triton.launch import ceil_div

ROOM = 108 << 10
"""Bytes of shared memory of a block at most: enough on their way to keep the memory busy, and the next kernel's block
finds room beside it on a multiprocessor of Hopper's."""

WARPS = (6, 4, 5, 8, 7, 3, 2)
"""Of a block, the better first. Few have too little on their way, many wait for each other."""


def some_rows_plan(
    rows: int,
    n: int,
    k: int,
    sms: int,
    *,
    gated: bool,
    normed: bool,
    shared: int = 227 << 10,
    splits: int = 2,
) -> Plan:
    """For up to MAX_ROWS rows. n: results. K: a multiple of 64.

    shared: bytes that a block may have. splits: blocks of a cluster at most, 1 below compute capability 9.0.
    """
    chunks, units, row_tiles = k // 64, ceil_div(n, 16), 2 if gated else 1

    def fits(plan: Plan) -> bool:
        return shared_bytes(rows, plan, norm=normed) <= min(ROOM, shared)

    def waves(split: int, warps: int) -> float:
        """How long all multiprocessors take for a block after another, in units of 16 results."""
        return ceil_div(ceil_div(units, warps) * split, sms) * warps / split

    choices = [
        (split, warps)
        for split in (1, 2, 4, 8)
        for warps in WARPS
        if split <= min(splits, chunks)
        and warps <= most_warps(rows, row_tiles)
        and fits(Plan(row_tiles, warps, 64, 3, split))
    ]
    # As short as can be; then blocks of four warps and more, of fewer columns only where needed.
    split, warps = min(choices, key=lambda c: (waves(*c), c[1] < 4, c[0], WARPS.index(c[1])))

    def stages(block_k: int) -> int:
        """As many as there is room for."""
        every = range(2, MAX_STAGES + 1)
        return max((c for c in every if fits(Plan(row_tiles, warps, block_k, c, split))), default=0)

    # Whole lines of 256 bytes where four chunks of them fit.
    block_k = 128 if k % 128 == 0 and stages(128) >= 4 else 64
    return Plan(row_tiles, warps, block_k, stages(block_k), split)
