"""PyTorch attention against a plain computation of each row, over random paged layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymllm_core.builtin.torch_attention import TorchAttention, self_check
from pymllm_core.nn.ops import attention_prep, rms_norm
from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV

CPU = torch.device("cpu")


def attend_plainly(q: torch.Tensor, kv: LayerKV, ctx: ForwardContext, scale: float) -> torch.Tensor:
    """Row by row, head by head, in float64: softmax(scale · q k) v over the tokens up to its own."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[1] // kv.k.shape[1]
    row = 0
    for index, count in enumerate(ctx.query_lens):
        length = ctx.kv_lens_host[index]
        slots = [
            int(ctx.page_table[index, position // ctx.page_size]) * ctx.page_size + position % ctx.page_size
            for position in range(length)
        ]
        for offset in range(count):
            seen = slots[: length - count + offset + 1]
            for head in range(q.shape[1]):
                keys, values = kv.k[seen, head // group].double(), kv.v[seen, head // group].double()
                weights = (keys @ q[row, head].double() * scale).softmax(0)
                out[row, head] = weights @ values
            row += 1
    return out


def layout(
    lengths: list[tuple[int, int]], page_size: int, kv: LayerKV, backend: TorchAttention, seed: int
) -> ForwardContext:
    """A context of (query length, KV length) pairs on shuffled pages; decodes come first."""
    lengths = sorted(lengths, key=lambda pair: pair[0] != 1)
    pages_of = [-(-length // page_size) for _, length in lengths]
    total = kv.k.shape[0] // page_size
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(total, generator=generator).tolist()
    # What lies beyond a sequence's own pages are numbers of others, as in the runner's table.
    table = torch.randint(0, total, (len(lengths), max(pages_of)), generator=generator, dtype=torch.int32)
    for index, count in enumerate(pages_of):
        table[index, :count] = torch.tensor([shuffled.pop() for _ in range(count)])
    query_lens = [count for count, _ in lengths]
    kv_lens = [length for _, length in lengths]
    positions = torch.cat([torch.arange(length - count, length) for count, length in lengths])
    return ForwardContext(
        positions=positions,
        slots=torch.zeros(sum(query_lens), dtype=torch.int64),
        query_start=torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
        page_table=table,
        num_decodes=sum(count == 1 for count in query_lens),
        query_lens=query_lens,
        kv_lens_host=kv_lens,
        page_size=page_size,
        kv=[kv],
        attention=backend,
    )


Lengths = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1])),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("batched", [False, True], ids=["each", "batched"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=Lengths,
    decodes=st.lists(st.integers(1, 40), max_size=5),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 3),
    dim=st.sampled_from([4, 10, 16]),
    page_size=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 1000),
)
def test_any_layout(
    batched: bool,
    lengths: list[tuple[int, int]],
    decodes: list[int],
    group: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    seed: int,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    scale = 0.7 / math.sqrt(dim)
    config = AttentionConfig(kv_heads * group, kv_heads, dim, page_size, scale, torch.float32, CPU)
    backend = TorchAttention(config, batch_decodes=batched)
    slots = 400 * page_size
    kv = LayerKV(torch.randn(slots, kv_heads, dim), torch.randn(slots, kv_heads, dim))
    ctx = layout([*lengths, *((1, length) for length in decodes)], page_size, kv, backend, seed)
    q = torch.randn(sum(ctx.query_lens), kv_heads * group, dim)
    backend.plan(ctx)
    torch.testing.assert_close(
        backend.attend(q, kv, ctx).double(), attend_plainly(q, kv, ctx, scale), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("batched", [False, True], ids=["each", "batched"])
def test_a_cache_of_another_dtype(batched: bool) -> None:
    config = AttentionConfig(4, 2, 8, 4, 0.3, torch.float32, CPU)
    backend = TorchAttention(config, batch_decodes=batched)
    kv = LayerKV(torch.randn(40, 2, 8).bfloat16(), torch.randn(40, 2, 8).bfloat16())
    ctx = layout([(1, 9), (5, 11)], 4, kv, backend, 3)
    backend.plan(ctx)
    q = torch.randn(6, 4, 8)
    torch.testing.assert_close(
        backend.attend(q, kv, ctx).double(), attend_plainly(q, kv, ctx, 0.3), atol=1e-5, rtol=1e-5
    )


def test_a_plan_serves_one_step_only() -> None:
    config = AttentionConfig(2, 1, 8, 4, 0.3, torch.float32, CPU)
    backend = TorchAttention(config, batch_decodes=True)
    kv = LayerKV(torch.randn(80, 1, 8), torch.randn(80, 1, 8))
    for seed, lengths in enumerate([[(1, 9), (1, 3)], [(4, 4)], [(1, 20)], [(3, 7), (1, 1)]]):
        ctx = layout(lengths, 4, kv, backend, seed)
        backend.plan(ctx)
        q = torch.randn(sum(ctx.query_lens), 2, 8)
        torch.testing.assert_close(
            backend.attend(q, kv, ctx).double(), attend_plainly(q, kv, ctx, 0.3), atol=1e-5, rtol=1e-5
        )


def test_prep_writes_the_slots_and_nothing_else() -> None:
    tokens, heads, kv_heads, dim = 5, 4, 2, 6
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    before = LayerKV(torch.randn(12, kv_heads, dim), torch.randn(12, kv_heads, dim))
    kv = LayerKV(before.k.clone(), before.v.clone())
    angles = torch.outer(torch.arange(30.0), torch.tensor([1.0, 0.3, 0.1]))
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions, slots = torch.tensor([4, 0, 9, 29, 7]), torch.tensor([7, 0, 3, -1, 9])
    weights = torch.rand(dim) + 0.5, torch.rand(dim) + 0.5
    q = attention_prep(qkv, positions, table, *weights, 1e-6, slots, kv.k, kv.v)
    parts = qkv.view(tokens, -1, dim)
    for token in range(tokens):
        # The rotation as a complex product: (low + i high) · e^(i angle).
        turn = torch.polar(torch.ones(3), angles[positions[token]])

        def turned(x: torch.Tensor, turn: torch.Tensor = turn) -> torch.Tensor:
            product = torch.complex(x[..., :3], x[..., 3:]) * turn
            return torch.cat((product.real, product.imag), dim=-1)

        normed = [
            rms_norm(parts[token, :heads], weights[0], 1e-6),
            rms_norm(parts[token, heads:-2], weights[1], 1e-6),
        ]
        torch.testing.assert_close(q[token], turned(normed[0]))
        if slots[token] >= 0:
            torch.testing.assert_close(kv.k[slots[token]], turned(normed[1]))
            torch.testing.assert_close(kv.v[slots[token]], parts[token, -2:])
    # A padding token may only use the last slot.
    untouched = [slot for slot in range(11) if slot not in slots.tolist()]
    torch.testing.assert_close(kv.k[untouched], before.k[untouched], atol=0, rtol=0)
    torch.testing.assert_close(kv.v[untouched], before.v[untouched], atol=0, rtol=0)


def test_the_doctor_can_check_it() -> None:
    assert "attended over 3 tokens" in self_check()
