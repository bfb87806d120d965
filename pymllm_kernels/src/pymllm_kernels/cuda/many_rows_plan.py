"""How a product of many rows is launched: explicit rules over its shape, nothing tried at run time.

They follow chains of a layer's four products of Qwen3 0.6B, 4B and 8B with 8 to 256 rows on an H200, in which one plan
was changed at a time, and decode steps with them (benchmarks/results/gpu_many_rows.jsonl).
"""

from __future__ import annotations

import dataclasses

from pymllm_kernels.cuda.many_rows_library import CHUNK, GROUP_ROWS, MAX_STAGES, Plan, shared_bytes
from pymllm_kernels.triton.launch import ceil_div

MAX_ROWS = 256
"""More rows are bound by arithmetic."""

SMALL = 8 << 20
"""Numbers of a weight up to which more than 128 rows were measured: those of 0.6B."""

LARGE = 32 << 20
"""Numbers of a gate (as many of up) from which the kernel of some rows, which norms x itself, wins up to 16 rows."""

LARGEST, MOST_OF_FOUR = 180 << 10, 5
"""Bytes of a block of up to 32 rows of x at most, and stages of one that shares the columns with three others or more:
the next kernel's blocks find room beside them, and ask for their weights early. A decode step of 8B with 32 sequences
takes 4.22 ms instead of 4.26, one of 0.6B with 8 takes 0.58 instead of 0.59."""

HALF = 0.45
"""Of the multiprocessors."""

RESERVED = 1 << 10
"""Bytes of a multiprocessor's shared memory that the device keeps for itself for each block."""

FEW_RESULTS = 2 << 20
"""Numbers of a weight, with at least twice as many columns as rows, up to which one row of x is this kernel's, too: the
output projection of 0.6B is too small to fill the device with blocks that have whole rows. 0.555 ms a step became 0.525
(benchmarks/results/gpu_tried.jsonl)."""


def takes_one_row(n: int, k: int, *, gated: bool) -> bool:
    """Whether one row of x is multiplied as several are."""
    return not gated and k >= 2 * n and n * k <= FEW_RESULTS


def many_rows_plan(
    rows: int, n: int, k: int, sms: int, *, gated: bool, shared: int = 227 << 10
) -> Plan | None:
    """For a number of rows; None where another kernel is faster, or this one does not take the shape.

    n: results. shared: bytes that a block may have.
    """
    tiles = ceil_div(n, GROUP_ROWS // (2 if gated else 1))
    # The output head is read at the memory's rate by any kernel.
    head, large = tiles > 8 * sms, tiles > 2 * sms
    if rows == 1 and not takes_one_row(n, k, gated=gated):
        return None
    if n % 2 or k % 8 or head or rows > MAX_ROWS or (rows > 128 and n * k > SMALL):
        return None
    if large and (rows <= 8 or rows > 64 or (rows <= 16 and n * k > LARGE)):
        return None
    x_rows = _x_rows(rows, tiles, k, sms)
    blocks = tiles * ceil_div(rows, x_rows)
    groups = 2 if x_rows == 128 and sms < blocks < 2 * sms else 1
    blocks = ceil_div(blocks, groups)
    splits = _splits(rows, blocks, k, sms)
    chunks = ceil_div(ceil_div(k, CHUNK), splits)
    # All blocks find room at once.
    room = (shared + RESERVED) // ceil_div(blocks * splits, sms) - RESERVED
    if x_rows <= 32:
        room = min(room, LARGEST)
    plan = Plan(x_rows, groups, min(MAX_STAGES if splits < 4 else MOST_OF_FOUR, max(chunks, 2)), splits)
    while plan.stages > 2 and shared_bytes(plan) > room:
        plan = dataclasses.replace(plan, stages=plan.stages - 1)
    return plan


def _x_rows(rows: int, tiles: int, k: int, sms: int) -> int:
    """Rows of x that a block has: all, unless there are too few blocks then."""
    if rows <= 64:
        return 1 << max((rows - 1).bit_length(), 3)
    if rows <= 128:
        return 128 if tiles >= 0.7 * sms or k >= 8192 else 64
    return 128 if tiles >= HALF * sms else 64


def _splits(rows: int, blocks: int, k: int, sms: int) -> int:
    """Blocks of a cluster that share the columns.

    Two, until nearly every multiprocessor has a block; the more rows there are, the more is to be pushed, and the
    sooner it is enough. More than two cost more than idle multiprocessors, of which half may be.
    """
    share = 0.75 if rows <= 32 else 0.6 if k >= 4096 else HALF
    splits = 1 if blocks >= share * sms else 2
    while splits < 8 and blocks * splits < HALF * sms:
        splits *= 2
    while splits > 1 and splits * CHUNK > k:
        splits //= 2  # each has a chunk at least
    return splits
