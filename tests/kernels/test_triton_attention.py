"""Triton's attention preparation and paged attention against float64."""

from __future__ import annotations

import pytest
import torch
from attention_support import context, expected
from triton_support import DEVICE, TINY, randn, rel_error

from pymllm_core.nn import ops
from pymllm_core.protocols.attention import AttentionConfig, LayerKV
from pymllm_kernels.triton.attention import MAX_SPLITS, TritonAttention
from pymllm_kernels.triton.attention_prep import TritonAttentionPrep

BF16, F16 = torch.bfloat16, torch.float16
NAN = float("nan")


def prepare(
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    norm: bool,
    dtype: torch.dtype,
    cache: torch.dtype,
    seed: int,
) -> None:
    qkv = randn(seed, tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    table = randn(seed + 1, 50, dim, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 50, (tokens,), generator=generator).to(DEVICE)
    slots = torch.randperm(tokens + 9, generator=generator)[:tokens].to(DEVICE)
    if tokens > 2:
        slots[1] = -1
    q_weight = randn(seed + 2, dim, dtype=dtype) if norm else None
    k_weight = randn(seed + 3, dim, dtype=dtype) if norm else None
    size = (tokens + 10, kv_heads, dim)
    k_cache = torch.full(size, NAN, dtype=cache, device=DEVICE)
    v_cache = torch.full(size, NAN, dtype=cache, device=DEVICE)
    q = TritonAttentionPrep()(qkv, positions, table, q_weight, k_weight, 1e-6, slots, k_cache, v_cache)
    # The definition on float64 copies; cos and sin are rounded to the computation's dtype in both.
    wide = [torch.zeros(size, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    weights = [None if w is None else w.double() for w in (q_weight, k_weight)]
    expected = ops.attention_prep(
        qkv.double(), positions, table.to(dtype).double(), *weights, 1e-6, slots, *wide
    )
    written = slots[slots >= 0]
    # Three roundings with a norm, one without; one more into the cache.
    assert rel_error(q, expected) < 3 * TINY[dtype]
    assert rel_error(k_cache[written], wide[0][written]) < 4 * TINY[BF16 if cache == BF16 else dtype]
    assert torch.equal(v_cache[written], qkv.view(tokens, -1, dim)[slots >= 0, -kv_heads:].to(cache))
    untouched = torch.ones(size[0], dtype=torch.bool, device=DEVICE)
    untouched[written] = False
    assert k_cache[untouched].isnan().all()
    assert v_cache[untouched].isnan().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 3, 16), (8, 1, 64), (5, 1, 20), (2, 2, 128)]
)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("norm", [True, False])
def test_preparation(heads: int, kv_heads: int, dim: int, tokens: int, norm: bool) -> None:
    prepare(tokens, heads, kv_heads, dim, norm=norm, dtype=BF16, cache=BF16, seed=dim)
    prepare(tokens, heads, kv_heads, dim, norm=norm, dtype=F16, cache=BF16, seed=dim)


def test_preparation_of_many_tokens() -> None:
    prepare(66, 3, 2, 16, norm=True, dtype=BF16, cache=BF16, seed=0)


def attend(
    heads: int,
    kv_heads: int,
    dim: int,
    page: int,
    queries: list[int],
    kv_lens: list[int],
    *,
    dtype: torch.dtype = BF16,
    cache: torch.dtype | None = None,
    seed: int = 0,
) -> int:
    """Compare one pass, made twice; the number of splits that its decodes took."""
    decodes = sum(count == 1 for count in queries)
    scale = dim**-0.5
    backend = TritonAttention(AttentionConfig(heads, kv_heads, dim, page, scale, dtype, DEVICE))
    ctx, slots = context(queries, kv_lens, decodes, page, backend, seed)
    kv = LayerKV(*(randn(seed + i, slots, kv_heads, dim, dtype=cache or dtype) for i in (1, 2)))
    q = randn(seed + 3, sum(queries), heads, dim, dtype=dtype, scale=2.0)
    if cache is None:
        # What belongs to no token must not matter.
        used = [
            int(ctx.page_table[s, p // page]) * page + p % page
            for s, n in enumerate(kv_lens)
            for p in range(n)
        ]
        free = torch.ones(slots, dtype=torch.bool)
        free[used] = False
        kv.k[free.to(DEVICE)] = NAN
        kv.v[free.to(DEVICE)] = NAN
    backend.plan(ctx)
    out = backend.attend(q, kv, ctx)
    # Softmax weights and the result are rounded once each.
    assert rel_error(out, expected(q, kv, ctx, scale)) < 2 * TINY[dtype]
    assert not backend._counters.any(), "a captured graph would merge too early"
    ctx.out = torch.full_like(q, NAN)
    again = backend.attend(q, kv, ctx)
    assert again.data_ptr() == ctx.out.data_ptr()
    assert torch.equal(out, again), "counters or partial results were left behind"
    return backend.splits(decodes, ctx.page_table.shape[1] * page)


@pytest.mark.parametrize("page", [1, 7, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 16), (2, 2, 64)])
def test_decodes(page: int, heads: int, kv_heads: int, dim: int) -> None:
    assert attend(heads, kv_heads, dim, page, [1], [300]) > 1
    attend(heads, kv_heads, dim, page, [1], [1], seed=1)
    attend(heads, kv_heads, dim, page, [1, 1, 1], [64, 65, 190], seed=2)


def test_decodes_of_a_large_batch_are_not_split() -> None:
    assert attend(2, 2, 16, 16, [1] * 9, [5, 200, 64, 1, 63, 17, 130, 128, 129], dtype=F16) == 1


def test_more_splits_than_blocks_leave_programs_without_work() -> None:
    assert attend(1, 1, 16, 64, [1, 1], [700, 40]) >= 8


@pytest.mark.parametrize(("page", "heads", "kv_heads", "dim"), [(1, 2, 1, 32), (16, 3, 1, 16)])
@pytest.mark.parametrize(
    ("queries", "kv_lens"),
    [([2], [2]), ([70], [70]), ([65, 3], [65, 150]), ([64], [200]), ([1, 1, 5, 130], [150, 2, 5, 200])],
)
def test_prompts_chunks_and_mixed_batches(
    page: int, heads: int, kv_heads: int, dim: int, queries: list[int], kv_lens: list[int]
) -> None:
    attend(heads, kv_heads, dim, page, queries, kv_lens, seed=len(queries))


def test_long_prompts_take_larger_blocks() -> None:
    attend(1, 1, 16, 16, [520], [600])


@pytest.mark.parametrize(("queries", "kv_lens"), [([1], [70]), ([20], [70])])
def test_other_dtypes_of_the_cache(queries: list[int], kv_lens: list[int]) -> None:
    attend(4, 2, 32, 16, queries, kv_lens, dtype=BF16, cache=F16)
    attend(4, 2, 32, 16, queries, kv_lens, dtype=F16)


def test_padding_without_tokens_is_zero() -> None:
    backend = TritonAttention(AttentionConfig(2, 1, 16, 16, 0.25, BF16, DEVICE))
    ctx, slots = context([1, 1], [40, 1], 2, 16, backend, 0)
    ctx.kv_lens[1] = 0
    kv = LayerKV(*(randn(i, slots, 1, 16) for i in (1, 2)))
    q = randn(3, 2, 2, 16)
    backend.plan(ctx)
    assert not backend.attend(q, kv, ctx)[1].any()


def test_splits_depend_on_batch_and_table_alone() -> None:
    backend = TritonAttention(AttentionConfig(2, 1, 16, 16, 0.25, BF16, DEVICE))
    programs = backend._programs
    for batch in (1, 2, 3, 8, 100, 1000):
        splits = backend.splits(batch, 40960)
        assert splits & (splits - 1) == 0
        assert splits <= MAX_SPLITS
        assert splits == 1 or batch * splits <= programs, "partial results would not fit"
    assert backend.splits(1, 64) == 1


def prepare_and_attend(
    heads: int,
    kv_heads: int,
    dim: int,
    kv_lens: list[int],
    *,
    page: int = 16,
    norm: bool = True,
    dtype: torch.dtype = BF16,
    seed: int = 0,
    **blocks: int,
) -> None:
    """A pass of decodes whose new tokens are not in the cache yet, against both definitions in float64."""
    count, scale, eps = len(kv_lens), dim**-0.5, 1e-6
    backend = TritonAttention(AttentionConfig(heads, kv_heads, dim, page, scale, dtype, DEVICE))
    ctx, slots = context([1] * count, kv_lens, count, page, backend, seed)
    ctx.positions = ctx.kv_lens.long() - 1
    rows = torch.arange(count, device=DEVICE)
    ctx.slots = ctx.page_table[rows, ctx.positions // page].long() * page + ctx.positions % page
    kv = LayerKV(*(randn(seed + i, slots, kv_heads, dim, dtype=dtype) for i in (1, 2)))
    kv.k[ctx.slots], kv.v[ctx.slots] = NAN, NAN
    qkv = randn(seed + 3, count, (heads + 2 * kv_heads) * dim, dtype=dtype, scale=2.0)
    angles = randn(seed + 4, max(kv_lens), dim // 2, dtype=torch.float32)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    q_weight, k_weight = (randn(seed + i, dim, dtype=dtype) if norm else None for i in (5, 6))
    wide = LayerKV(kv.k.double(), kv.v.double())
    weights = [None if w is None else w.double() for w in (q_weight, k_weight)]
    q = ops.attention_prep(
        qkv.double(), ctx.positions, table.to(dtype).double(), *weights, eps, ctx.slots, wide.k, wide.v
    )
    before = kv.k.clone(), kv.v.clone()
    backend.plan(ctx)
    for _ in range(2):
        out = backend.prepare_and_attend(qkv, table, q_weight, k_weight, eps, kv, ctx, **blocks)
        # Queries and keys are rounded four times, softmax weights and the result once each.
        assert rel_error(out, expected(q, wide, ctx, scale)) < 6 * TINY[dtype]
        assert rel_error(kv.k[ctx.slots], wide.k[ctx.slots]) < 4 * TINY[dtype]
        assert torch.equal(kv.v[ctx.slots], qkv.view(count, -1, dim)[:, -kv_heads:])
    untouched = torch.ones(slots, dtype=torch.bool, device=DEVICE)
    untouched[ctx.slots] = False
    assert torch.equal(kv.k[untouched], before[0][untouched])
    assert torch.equal(kv.v[untouched], before[1][untouched])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 64), (2, 2, 32)])
@pytest.mark.parametrize("kv_lens", [[1], [2], [65], [300], [1, 64, 65, 129, 190, 7]])
def test_preparing_decodes(heads: int, kv_heads: int, dim: int, kv_lens: list[int]) -> None:
    prepare_and_attend(heads, kv_heads, dim, kv_lens, seed=len(kv_lens) + dim)


def test_preparing_decodes_otherwise() -> None:
    prepare_and_attend(4, 2, 32, [140, 3], page=7, norm=False, dtype=F16)
    prepare_and_attend(4, 2, 32, [140, 3], least=1, block=32, seed=3)
    prepare_and_attend(4, 2, 32, [600], least=4, block=16, stages=1, seed=4)


def test_preparing_padding_writes_nothing() -> None:
    backend = TritonAttention(AttentionConfig(2, 1, 32, 16, 0.2, BF16, DEVICE))
    ctx, slots = context([1, 1], [20, 1], 2, 16, backend, 0)
    ctx.positions = torch.tensor([19, 0], device=DEVICE)
    ctx.slots = torch.tensor([int(ctx.page_table[0, 1]) * 16 + 3, -1], device=DEVICE)
    kv = LayerKV(*(randn(i, slots, 1, 32) for i in (1, 2)))
    before = kv.k.clone()
    backend.plan(ctx)
    table = torch.ones(32, 32, device=DEVICE)
    backend.prepare_and_attend(randn(3, 2, 128), table, None, None, 0.0, kv, ctx)
    changed = (kv.k != before).any(-1).any(-1).nonzero().flatten().tolist()
    assert changed == [int(ctx.slots[0])]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (32, 8, 128), (8, 4, 256), (14, 2, 64)])
def test_preparing_decodes_in_shapes_of_models(heads: int, kv_heads: int, dim: int) -> None:
    for seed in range(3):
        prepare_and_attend(heads, kv_heads, dim, [4000], seed=seed)
        prepare_and_attend(heads, kv_heads, dim, [1 + 37 * i for i in range(40)], seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (32, 8, 128), (8, 4, 256), (14, 2, 64)])
def test_shapes_of_models(heads: int, kv_heads: int, dim: int) -> None:
    for seed in range(3):
        attend(heads, kv_heads, dim, 16, [1], [4000], seed=seed)
        attend(heads, kv_heads, dim, 16, [1] * 40, [1 + 37 * i for i in range(40)], seed=seed)
        attend(heads, kv_heads, dim, 16, [1, 1, 700, 5, 130], [900, 3, 2000, 5, 130], seed=seed)


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths() -> None:
    heads, kv_heads, dim, page = 16, 8, 128, 16
    backend = TritonAttention(AttentionConfig(heads, kv_heads, dim, page, dim**-0.5, BF16, DEVICE))
    ctx, slots = context([1, 1], [2000, 2000], 2, page, backend, 0)
    kv = LayerKV(*(randn(i, slots, kv_heads, dim) for i in (1, 2)))
    q = randn(3, 2, heads, dim)
    backend.plan(ctx)
    backend.attend(q, kv, ctx)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.attend(q, kv, ctx)
    for lengths in ([1, 2000], [64, 65], [1999, 130]):
        ctx.kv_lens.copy_(torch.tensor(lengths))
        ctx.kv_lens_host = lengths
        q.copy_(randn(lengths[0], 2, heads, dim))
        graph.replay()
        assert rel_error(out, expected(q, kv, ctx, dim**-0.5)) < 2 * TINY[BF16]
