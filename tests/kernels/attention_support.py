"""Passes of attention for the tests of its backends, and their results in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton_support import DEVICE

from pymllm_core.protocols.attention import ForwardContext, LayerKV


def context(
    queries: list[int], kv: list[int], decodes: int, page: int, backend: Any, seed: int
) -> tuple[ForwardContext, int]:
    """A pass over scattered pages; the rest of the table names no page. Also the cache's number of slots."""
    pages = [-(-length // page) for length in kv]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(pages) + 3, generator=generator).int()
    table = torch.full((len(kv), max(pages) + 2), 1 << 30, dtype=torch.int32)
    first = 0
    for row, count in enumerate(pages):
        table[row, :count] = order[first : first + count]
        first += count
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    nothing = torch.empty(0, dtype=torch.int64)
    lengths = torch.tensor(kv, dtype=torch.int32)
    ctx = ForwardContext(
        positions=nothing,
        slots=nothing,
        query_start=starts.to(DEVICE),
        kv_lens=lengths.to(DEVICE),
        page_table=table.to(DEVICE),
        num_decodes=decodes,
        query_lens=queries,
        kv_lens_host=kv,
        page_size=page,
        kv=[],
        attention=backend,
    )
    return ctx, len(order) * page


def expected(q: Tensor, kv: LayerKV, ctx: ForwardContext, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float64, device=DEVICE)
    row = 0
    for sequence, (count, length) in enumerate(zip(ctx.query_lens, ctx.kv_lens_host, strict=True)):
        position = torch.arange(length, device=DEVICE)
        pages = ctx.page_table[sequence, position // ctx.page_size].long()
        slots = pages * ctx.page_size + position % ctx.page_size
        group = q.shape[1] // kv.k.shape[1]
        k, v = (cache[slots].double().repeat_interleave(group, 1) for cache in (kv.k, kv.v))
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count].double(), k) * scale
        seen = position[None] <= torch.arange(length - count, length, device=DEVICE)[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[row : row + count] = torch.einsum("hqk,khd->qhd", weights, v)
        row += count
    return out
