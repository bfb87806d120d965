"""How a product of few rows is launched: explicit rules over its shape, nothing tried at run time.

They follow decode steps of Qwen3 0.6B, 4B and 8B on an H200 in which one launch was changed
(benchmarks/results/gpu_plans.jsonl), for several rows chains of like launches (benchmarks/results/gpu_few_rows.jsonl).
Several rows of bfloat16 have rules of their own (some_rows_plan).
"""

from __future__ import annotations

from pymllm_kernels.cuda.few_rows_library import UNIT, Plan
from pymllm_kernels.triton.launch import ceil_div

SMALL = 16 << 20
"""Bytes of a bfloat16 weight under which Triton's kernel for one row is faster."""

CLOSER_BFLOAT16, CLOSER_INT4, LARGE_INT4 = 2048, 512, 40 << 20
"""While a block waits for x, its warps ask for so many bytes of each of their results or tiles beyond those on their
way: of bfloat16, and of int4 weights that have at least LARGE_INT4 bytes. Twice as many are worse than none, and so is
asking before the wait. int8 gains nothing by it, and the output head, which is read at the memory's rate anyway, may
lose 2 %."""


def is_head(n: int, sms: int) -> bool:
    """Whether a product has as many results as only an output head has."""
    return n >= 256 * sms


def one_row_is_ours(n: int, k: int, sms: int) -> bool:
    """Whether one row of a large bfloat16 weight is faster with our kernel than with Triton's.

    That one likes columns in blocks of 2048, and is slower at the output head.
    """
    return is_head(n, sms) or k % 2048 != 0


def one_row_plan(n: int, k: int, sms: int, *, gated: bool, bits: int) -> Plan:
    """For one row and weights of 8 or 16 bits: 512 bytes of a row of the weight at a time. n: results."""
    if bits == 8:
        return _int8_plan(n, ceil_div(k, 512), sms, gated=gated)
    return _bfloat16_plan(n, k, sms, gated=gated)


def _bfloat16_plan(n: int, k: int, sms: int, *, gated: bool) -> Plan:
    if is_head(n, sms):
        return Plan(4, 8, staged=True, ahead=2)
    chunks = ceil_div(k, 256)  # of 512 bytes, of a row of the weight
    if gated:
        # Turns of which none is partly empty.
        row_tiles, ahead, blocks = (1, 8 if chunks % 5 else 5, 2 * sms) if k < 4096 else (2, 4, 4 * sms)
        return Plan(row_tiles, 8, True, ahead, blocks, CLOSER_BFLOAT16)
    if n > k:
        return Plan(2, 8, True, 4, closer=CLOSER_BFLOAT16)
    return Plan(1, 8, True, 10, closer=CLOSER_BFLOAT16)


def _int8_plan(n: int, chunks: int, sms: int, *, gated: bool) -> Plan:
    """chunks: of 512 bytes, of a row of the weight."""
    if gated:
        if chunks <= 2:
            return Plan(2, 8, staged=True, ahead=2)
        if chunks == 5:
            return Plan(2, 8, staged=True, ahead=5, blocks=sms)
        # One block a multiprocessor: what the next kernel asks for early has room beside it.
        return Plan(4, 8, staged=True, ahead=4, blocks=sms)
    if chunks <= 8 and n >= 31 * sms:
        return Plan(4, 8, staged=True, ahead=4)
    return Plan(2, 8 if n >= 16 * sms else 4, staged=True, ahead=8)


def tiles_plan(rows: int, n: int, k: int, sms: int, *, gated: bool, weights: str) -> Plan:
    """On the tensor cores. rows: up to MAX_ROWS of ``int4``, 2 to 8 of ``int8``: the weights."""
    units = k // UNIT[weights]
    if rows > 8:
        row_tiles, limit = 2, 8 if n <= 32 * sms else 4
    elif gated:
        row_tiles, limit = (
            (2, 8) if weights == "int4" and n < 64 * sms else (4, 4 if weights == "int4" else 8)
        )
    elif weights == "int4" and n >= 24 * sms and k < n:
        # As many small blocks as find room at once, or half as many.
        row_tiles, limit = (2, 8) if k >= 4096 else (1, 8 if n <= 32 * sms else 6)
    else:
        row_tiles, limit = 1, 12
    large = weights == "int4" and n * k * (2 if gated else 1) // 2 >= LARGE_INT4
    closer = CLOSER_INT4 if rows == 1 and large else 0
    # Each block would norm or quantise all rows: worth it for one.
    return Plan(row_tiles, min(units, limit), staged=rows == 1, closer=closer)


def most_warps(rows: int, row_tiles: int, weights: str) -> int:
    """Warps that a block of csrc/cuda/tiles.h may have, by ``int8`` or ``int4``; 0 where no such kernel is compiled."""
    if weights == "int8" and rows > 8:
        return 0
    if weights == "int4" and row_tiles == 4:
        return 4 if rows <= 8 else 8 if rows <= 16 else 0
    return 12 if row_tiles == 1 and rows <= 8 else 8
