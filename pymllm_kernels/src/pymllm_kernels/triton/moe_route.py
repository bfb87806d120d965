"""The operation ``moe_route``, and which rows each expert computes: two launches, nothing read by the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymllm_kernels.triton.launch import power_of_2


@triton.jit
def route_kernel(
    logits,
    weights,
    ids,
    stride,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: softmax over E experts, the TOP_K most probable in order, the lower number where two are equal."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    row = tl.load(logits + token * stride + experts, mask=experts < E, other=float("-inf")).to(tl.float32)
    exponents = tl.exp(row - tl.max(row, axis=0))
    left = exponents / tl.sum(exponents, axis=0)
    # Behind the last expert stands less than any probability, also than that of an expert that was taken.
    left = tl.where(experts < E, left, -2.0)
    places = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    total = 0.0
    for place in tl.static_range(TOP_K):
        best, expert = tl.max(left, axis=0, return_indices=True, return_indices_tie_break_left=True)
        # A row of NaN takes no place twice, and none that does not exist.
        expert = tl.minimum(expert, E - 1)
        tl.store(ids + token * TOP_K + place, expert)
        found = tl.where(places == place, best, found)
        total += best
        left = tl.where(experts == expert, -1.0, left)
    if RENORMALISE:
        found /= total
    tl.store(weights + token * TOP_K + places, found, mask=places < TOP_K)


@triton.jit(do_not_specialize=["pairs"])
def expert_rows_kernel(ids, order, starts, counts, pairs, BLOCK: tl.constexpr):
    """One expert: its pairs of token and place, in rising order, behind those of the experts before it."""
    expert = tl.program_id(0)
    before = 0
    count = 0
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = tl.load(ids + at, mask=at < pairs, other=2147483647)
        before += tl.sum((found < expert).to(tl.int32), axis=0)
        count += tl.sum((found == expert).to(tl.int32), axis=0)
    tl.store(starts + expert, before)
    tl.store(counts + expert, count)
    if count > 0:
        for start in range(0, pairs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mine = (tl.load(ids + at, mask=at < pairs, other=2147483647) == expert).to(tl.int32)
            tl.store(order + before + tl.cumsum(mine, axis=0) - 1, at, mask=mine > 0)
            before += tl.sum(mine, axis=0)


def triton_route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """`nn.moe_ops.route` in one launch; the ids are int32."""
    tokens, experts = logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    if tokens:
        block = power_of_2(experts)
        route_kernel[(tokens,)](
            logits, weights, ids, logits.stride(0), experts, top_k, renormalise, block, num_warps=1
        )
    return weights, ids


def make_route() -> object:
    """The implementation as the plan makes it."""
    return triton_route


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Pairs t · top_k + place, grouped by expert: those of e are order[starts[e] : starts[e] + counts[e]]."""

    order: Tensor
    starts: Tensor
    counts: Tensor


def expert_rows(ids: Tensor, experts: int) -> ExpertRows:
    """ids: [T, top_k]. A counting sort whose order depends on nothing but the ids."""
    pairs = ids.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    starts, counts = torch.empty((2, experts), dtype=torch.int32, device=ids.device)
    expert_rows_kernel[(experts,)](ids, order, starts, counts, pairs, BLOCK=1024, num_warps=4)
    return ExpertRows(order, starts, counts)
