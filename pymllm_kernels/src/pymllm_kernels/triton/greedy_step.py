"""The operation ``greedy_step``: two launches, one over all logits, one over what they leave."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_core.nn.step_ops import DecodeState
from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2

BLOCK = 2048
"""Logits that a program reads at a time."""
MAX_PARTS = 128
MAX_BESTS = 4096
"""Parts of a row at most; and of all rows together, which one program compares in the end."""


@triton.jit(do_not_specialize=["WIDTH"])
def best_of_part_kernel(
    logits, bests, places, stride, V, WIDTH, PARTS, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """The largest of WIDTH logits of a row, and the first place where it stands."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, row = tl.program_id(0), tl.program_id(1)
    first = part * WIDTH
    end = tl.minimum(first + WIDTH, V)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = first + lanes
    for start in range(first, end, BLOCK):
        at = start + lanes
        value = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < end, other=float("-inf"))
        # No comparison with NaN holds: a row of nothing else keeps its first place, as one of -inf.
        place = tl.where(value > best, at, place)
        best = tl.where(value > best, value, best)
    top = tl.max(best, axis=0)
    tl.store(bests + row * PARTS + part, top)
    tl.store(places + row * PARTS + part, tl.min(tl.where(best == top, place, 2147483647), axis=0))


@triton.jit(do_not_specialize=["rows", "PARTS"])
def next_step_kernel(
    bests,
    places,
    ids,
    positions,
    slots,
    kv_lens,
    steps,
    page_table,
    chosen,
    turn,
    rows,
    table_width,
    chosen_stride,
    PARTS,
    TURNS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for all rows: the best of their parts, and the numbers of the next step."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, BLOCK_R)
    part = tl.arange(0, BLOCK_P)
    mask = row < rows
    at = row[:, None] * PARTS + part[None, :]
    there = mask[:, None] & (part < PARTS)[None, :]
    best = tl.load(bests + at, mask=there, other=float("-inf"))
    place = tl.load(places + at, mask=there, other=2147483647)
    top = tl.max(best, axis=1)
    token = tl.min(tl.where(best == top[:, None], place, 2147483647), axis=1).to(tl.int64)
    tl.store(ids + row, token, mask=mask)
    now = tl.load(turn)
    tl.store(chosen + (now % TURNS) * chosen_stride + row, token, mask=mask)
    step = tl.load(steps + row, mask=mask, other=0)
    position = tl.load(positions + row, mask=mask, other=0) + step
    tl.store(positions + row, position, mask=mask)
    tl.store(kv_lens + row, tl.load(kv_lens + row, mask=mask, other=0) + step, mask=mask)
    # After a sequence's last token there may be no page: the slot is then never used.
    page = tl.minimum(position // PAGE_SIZE, table_width - 1)
    page = tl.load(page_table + row.to(tl.int64) * table_width + page, mask=mask, other=0).to(tl.int64)
    tl.store(slots + row, page * PAGE_SIZE + position % PAGE_SIZE, mask=mask)
    # All threads have read the turn.
    tl.debug_barrier()
    tl.store(turn, now + 1)


class TritonGreedyStep:
    """`nn.step_ops.GreedyStep`; the lowest token of those with the largest logit."""

    reports = True

    def __call__(self, logits: Tensor, state: DecodeState) -> None:
        assert logits.stride(1) == 1
        assert state.page_table.is_contiguous()
        (rows, vocab), device = logits.shape, gpu(logits.device)
        block_r = power_of_2(rows)
        most = max(min(MAX_PARTS, MAX_BESTS // block_r), 1)
        width = ceil_div(ceil_div(vocab, most), BLOCK) * BLOCK
        parts = ceil_div(vocab, width)
        bests = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
        places = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
        best_of_part_kernel[(parts, rows)](
            logits, bests, places, logits.stride(0), vocab, width, parts,
            BLOCK=BLOCK, PDL=device.pdl, num_warps=4, launch_pdl=device.pdl,
        )  # fmt: skip
        next_step_kernel[(1,)](
            bests, places, state.ids, state.positions, state.slots, state.kv_lens, state.steps,
            state.page_table, state.chosen, state.turn, rows, state.page_table.shape[1], state.chosen.stride(0), parts,
            TURNS=len(state.chosen), PAGE_SIZE=state.page_size, BLOCK_R=block_r, BLOCK_P=power_of_2(parts),
            PDL=device.pdl, num_warps=4, launch_pdl=device.pdl,
        )  # fmt: skip
