"""Paged attention against float64, and its independence of chunking, batch and threads."""

from __future__ import annotations

import pytest
import torch
from cpu_support import needs_cpu_kernels, randn, rel_error, threads
from torch import Tensor

from pymllm_kernels.cpu import paged_attention

pytestmark = needs_cpu_kernels

# bf16 probabilities (2^-9 each, averaging out) and one rounding of the result.
BOUND = 5e-3


class Case:
    """Sequences of given (cached, new) lengths over shuffled pages."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        dim: int,
        page_size: int,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.lengths, self.page_size, self.scale = lengths, page_size, dim**-0.5
        tokens = sum(new for _, new in lengths)
        pages = [-(-(old + new) // page_size) for old, new in lengths]
        order = torch.randperm(sum(pages) + 3, generator=g).to(torch.int32)
        self.page_table = torch.full((len(lengths), max(pages) + 1), -1, dtype=torch.int32)
        for s, count in enumerate(pages):
            self.page_table[s, :count] = order[sum(pages[:s]) : sum(pages[:s]) + count]
        self.q = randn(g, tokens, heads, dim, scale=2.0)
        slots = (sum(pages) + 3) * page_size
        self.k, self.v = randn(g, slots, kv_heads, dim), randn(g, slots, kv_heads, dim)
        for s in range(len(lengths)):  # slots past the end hold anything, NaN included
            for position in range(sum(lengths[s]), pages[s] * page_size):
                self.k[self.slot(s, position)] = float("nan")
                self.v[self.slot(s, position)] = float("nan")

    def slot(self, sequence: int, position: int) -> int:
        page = int(self.page_table[sequence, position // self.page_size])
        return page * self.page_size + position % self.page_size

    def run(self) -> Tensor:
        starts = [sum(new for _, new in self.lengths[:s]) for s in range(len(self.lengths) + 1)]
        return paged_attention(
            self.q,
            self.k,
            self.v,
            self.page_table,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([old + new for old, new in self.lengths], dtype=torch.int32),
            self.page_size,
            self.scale,
            out=torch.full_like(self.q, float("nan")),
        )

    def expected(self) -> Tensor:
        group = self.q.shape[1] // self.k.shape[1]
        rows = []
        token = 0
        for s, (old, new) in enumerate(self.lengths):
            slots = [self.slot(s, p) for p in range(old + new)]
            k = self.k[slots].double().repeat_interleave(group, 1)
            v = self.v[slots].double().repeat_interleave(group, 1)
            q = self.q[token : token + new].double()
            token += new
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            positions = torch.arange(old + new)
            scores.masked_fill_(positions > old + torch.arange(new)[:, None], float("-inf"))
            rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        return torch.cat(rows)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(16, 8, 128), (4, 4, 64), (3, 1, 64), (7, 7, 80), (10, 2, 16), (1, 1, 34), (14, 2, 192)],
)
@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 1)],
        [(5, 1), (254, 1), (255, 1), (256, 1), (0, 1), (777, 1)],
        [(0, 33), (17, 5), (300, 1), (0, 0), (250, 70)],
        [(0, 517)],
    ],
)
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_matches_float64(
    heads: int, kv_heads: int, dim: int, lengths: list[tuple[int, int]], page_size: int
) -> None:
    case = Case(lengths, heads, kv_heads, dim, page_size, seed=heads + dim + page_size)
    assert rel_error(case.run(), case.expected()) < BOUND


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (3, 1, 64)])
def test_rows_do_not_depend_on_chunking_batch_or_threads(heads: int, kv_heads: int, dim: int) -> None:
    whole_case = Case([(0, 600), (0, 40)], heads, kv_heads, dim, 16)
    whole = whole_case.run()
    for count in (1, 2, 5):
        with threads(count):
            assert torch.equal(whole_case.run(), whole)
            for old, new in [(0, 1), (0, 100), (100, 156), (255, 2), (256, 1), (599, 1), (550, 50)]:
                part = Case([(0, 600)], heads, kv_heads, dim, 16)
                part.k, part.v = whole_case.k, whole_case.v
                part.page_table = whole_case.page_table[:1]
                part.lengths = [(old, new)]
                part.q = whole_case.q[old : old + new]
                assert torch.equal(part.run(), whole[old : old + new]), (count, old, new)


def test_large_scores_stay_finite() -> None:
    case = Case([(300, 20)], 2, 1, 64, 16)
    case.q *= 1000.0
    out = case.run()
    assert out.isfinite().all()
    assert rel_error(out, case.expected()) < BOUND


def test_wrong_arguments_are_refused() -> None:
    case = Case([(3, 1)], 4, 2, 64, 4)
    case.k = case.k[:, :, :32]
    with pytest.raises(ValueError, match="k_cache must be"):
        case.run()
    case = Case([(3, 1)], 4, 2, 64, 4)
    case.page_table = case.page_table.long()
    with pytest.raises(ValueError, match="page_table must be"):
        case.run()
    case = Case([(3, 1)], 5, 5, 64, 4)
    case.k, case.v = case.k[:, :2].contiguous(), case.v[:, :2].contiguous()
    with pytest.raises(ValueError, match="multiple of 2"):
        case.run()
