"""Routed experts by Triton, against float64 sums over dequantised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE, TINY, randn, rel_error, swiglu

from pymllm_core.nn.moe_ops import route
from pymllm_core.nn.quant_ops import dequantize, quantize_per_token_int8, unpack_int4
from pymllm_kernels.triton import moe
from pymllm_kernels.triton.moe import TritonExperts, TritonInt4Experts, TritonInt8Experts
from pymllm_kernels.triton.moe_plan import MAX_FEW_TOKENS, grouped_blocks, max_blocks, vector_blocks
from pymllm_kernels.triton.moe_route import expert_rows, triton_route
from pymllm_kernels.triton.moe_w8a8 import TritonW8A8Experts, quantise_rows

BF16, F16 = torch.bfloat16, torch.float16
KERNELS = {16: TritonExperts, 8: TritonInt8Experts, 4: TritonInt4Experts}


def make_experts(
    seed: int, experts: int, n: int, k: int, *, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that `pack` receives, and what they mean: [experts, n, k] in float64.

    Made on the device, where the experts of a whole model's layer would take seconds otherwise.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)
    random: dict[str, Any] = {"generator": generator, "device": DEVICE}
    if bits == 16:
        weight = (torch.randn(experts, n, k, **random) * k**-0.5).to(dtype)
        return {"weight": weight}, weight.double()
    high = 1 << (bits - 1)
    shape = (experts, n, k // 2) if bits == 4 else (experts, n, k)
    low, top, stored = (0, 256, torch.uint8) if bits == 4 else (-high, high, torch.int8)
    tensors = {"weight": torch.randint(low, top, shape, dtype=stored, **random)}
    scale = (torch.rand(experts, n, k // group, **random) + 0.5) / (high * k**0.5)
    tensors["scale"] = scale.to(dtype)
    if not symmetric:
        groups = (experts, n, k // group)
        tensors["zero_point"] = torch.randint(-high, high, groups, dtype=torch.int8, **random)
    wide = []
    for expert in range(experts):
        codes = unpack_int4(tensors["weight"][expert], k) if bits == 4 else tensors["weight"][expert]
        zero = tensors["zero_point"][expert] if not symmetric else None
        wide.append(dequantize(codes, tensors["scale"][expert].double(), zero))
    return tensors, torch.stack(wide)


def check(
    tokens: int,
    *,
    experts: int = 5,
    top_k: int = 2,
    hidden: int = 64,
    width: int = 32,
    bits: int = 16,
    group: int = 32,
    symmetric: bool = True,
    residual: bool = True,
    dtype: torch.dtype = BF16,
    seed: int = 0,
    ids: Tensor | None = None,
) -> Tensor:
    fields: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "dtype": dtype}
    size = (hidden, width) if group == -1 else (group, group)
    up, wide_up = make_experts(seed + 1, experts, 2 * width, hidden, group=size[0], **fields)
    down, wide_down = make_experts(seed + 2, experts, hidden, width, group=size[1], **fields)
    x = randn(seed + 3, tokens, hidden + 8, dtype=dtype)[:, :hidden]  # rows that lie apart
    extra = randn(seed + 4, tokens, hidden + 8, dtype=dtype)[:, 8:] if residual else None
    weights, chosen = route(randn(seed + 5, tokens, experts, dtype=torch.float32), top_k, True)
    chosen = chosen if ids is None else ids
    expected = torch.zeros(tokens, hidden, dtype=torch.float64, device=DEVICE)
    for token in range(tokens):
        for weight, expert in zip(weights[token].double(), chosen[token].tolist(), strict=True):
            y = swiglu(wide_up[expert] @ x[token].double())
            expected[token] += weight * (wide_down[expert] @ y)
    if extra is not None:
        expected += extra.double()
    kernel = KERNELS[bits]()
    packed = kernel.pack(up, down)
    out = kernel.apply(x, weights, chosen, packed, residual=extra)
    assert out.shape == (tokens, hidden)
    assert out.dtype == dtype
    # Rounded: the hidden row and the result; with many tokens also each expert's result, and integer weights.
    assert rel_error(out, expected) < 1e-6 + TINY[dtype] * (2 + 2 * (tokens > MAX_FEW_TOKENS[bits]))
    return out


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 19])
def test_numbers_of_tokens(tokens: int, bits: int) -> None:
    check(tokens, bits=bits, symmetric=tokens % 2 == 0, residual=tokens != 4)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 96), (4, -1), (8, -1), (8, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups(tokens: int, bits: int, group: int, symmetric: bool) -> None:
    sizes = {"hidden": 192, "width": 96} if group == 96 else {"hidden": 64, "width": 64}
    check(tokens, bits=bits, group=group, symmetric=symmetric, experts=3, **sizes)


@pytest.mark.parametrize("tokens", [2, 11])
@pytest.mark.parametrize(("hidden", "width"), [(40, 20), (130, 6), (24, 72)])
def test_odd_sizes(tokens: int, hidden: int, width: int) -> None:
    check(tokens, hidden=hidden, width=width, experts=7, top_k=3)
    check(tokens, hidden=hidden, width=width, experts=7, top_k=3, dtype=F16)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 1), (5, 5), (33, 8)])
def test_numbers_of_experts(tokens: int, experts: int, top_k: int) -> None:
    check(tokens, experts=experts, top_k=top_k, hidden=32, width=16)


def test_all_tokens_want_the_same_experts() -> None:
    check(21, ids=torch.tensor([[4, 1]] * 21, device=DEVICE))


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_every_block_size(block_m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = {16: 4, 32: 32, 64: 64, 128: 128}[block_m]
    blocks = grouped_blocks(mean, 2, 2, 32, 32, 16, gated=True)
    assert blocks.block_m == block_m
    monkeypatch.setattr(moe, "grouped_blocks", lambda *_, **__: blocks)
    check(19, experts=2, hidden=48)


def test_a_token_gets_the_same_wherever_it_stands() -> None:
    """The other tokens of a step decide in which block a row is computed, not what comes out."""
    kernel = TritonExperts()
    up, _ = make_experts(1, 4, 32, 32, bits=16, group=32, symmetric=True, dtype=BF16)
    down, _ = make_experts(2, 4, 32, 16, bits=16, group=32, symmetric=True, dtype=BF16)
    packed = kernel.pack(up, down)
    x = randn(3, 24, 32)
    weights, ids = route(randn(4, 24, 4, dtype=torch.float32), 2, True)
    together = kernel.apply(x, weights, ids, packed)
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    again = kernel.apply(x[shuffled], weights[shuffled], ids[shuffled], packed)
    assert torch.equal(again, together[shuffled])
    assert torch.equal(kernel.apply(x, weights, ids, packed), together)


def test_no_tokens() -> None:
    kernel = TritonExperts()
    up, _ = make_experts(1, 2, 32, 32, bits=16, group=32, symmetric=True, dtype=BF16)
    down, _ = make_experts(2, 2, 32, 16, bits=16, group=32, symmetric=True, dtype=BF16)
    empty = torch.zeros(0, 2, device=DEVICE)
    out = kernel.apply(randn(0, 0, 32), empty, empty.int(), kernel.pack(up, down))
    assert out.shape == (0, 32)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 2), (8, 8), (128, 8), (100, 3)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_routing_is_its_definition(experts: int, top_k: int, renormalise: bool) -> None:
    generator = torch.Generator().manual_seed(experts)
    for logits in (
        torch.randn(9, experts, generator=generator) * 3,
        torch.randint(0, 4, (9, experts), generator=generator).float() * 2,  # full of ties
        torch.zeros(2, experts),
        torch.randn(3, experts, generator=generator) * 1e4,
    ):
        expected_weights, expected = route(logits, top_k, renormalise)
        weights, ids = triton_route(logits.to(DEVICE), top_k, renormalise)
        distinct = expected_weights.cpu() > 0  # of probabilities that underflow, any order
        assert torch.equal(ids.cpu().long()[distinct], expected[distinct])
        torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_routing_of_nan_stays_within_bounds() -> None:
    _, ids = triton_route(torch.full((2, 5), float("nan"), device=DEVICE), 3, True)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 5


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (40, 7), (700, 3), (33, 128)])
def test_rows_of_experts(tokens: int, experts: int) -> None:
    ids = torch.randint(0, experts, (tokens, 2), generator=torch.Generator().manual_seed(tokens))
    found = expert_rows(ids.to(torch.int32).to(DEVICE), experts)
    flat = ids.flatten()
    assert found.counts.tolist() == torch.bincount(flat, minlength=experts).tolist()
    assert found.order.tolist() == flat.argsort(stable=True).tolist()
    assert found.starts.tolist() == [int((flat < expert).sum()) for expert in range(experts)]


@pytest.mark.parametrize("block_m", [16, 64])
def test_the_grid_is_large_enough_for_any_routing(block_m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for pairs in (1, 15, 16, 17, 200, 1000):
        for experts in (1, 3, 128):
            for spread in (0.0, 1.0, 30.0):
                shares = (torch.randn(experts, generator=generator) * spread).softmax(0)
                picked = torch.multinomial(shares, pairs, replacement=True, generator=generator)
                blocks = -(-torch.bincount(picked) // block_m)
                assert int(blocks.sum()) <= max_blocks(pairs, experts, block_m)


def test_blocks_fit_their_groups() -> None:
    for bits, group in ((16, 2048), (4, 32), (4, 96), (4, 128), (4, 768), (8, 768), (8, 2048)):
        blocks = vector_blocks(768, group * 4, group, bits, 132, 8, gated=True)
        assert blocks.block_k % blocks.sub == 0
        assert bits == 16 or group % blocks.sub == 0
        rows = grouped_blocks(64, 8, 128, 768, group, bits, gated=True)
        assert bits == 16 or (group % rows.block_k == 0 and rows.block_k >= 32)


def quantised(x: Tensor) -> Tensor:
    """x as 8-bit codes of each row mean it, in float64."""
    codes, scale = quantize_per_token_int8(x)
    return codes.double() * scale.double()


def check_w8a8(tokens: int, *, experts: int, top_k: int, hidden: int, width: int, residual: bool) -> None:
    random: dict[str, Any] = {"generator": torch.Generator(DEVICE).manual_seed(tokens), "device": DEVICE}
    shapes = {"gate_up": (experts, 2 * width, hidden), "down": (experts, hidden, width)}
    tensors = {}
    for name, shape in shapes.items():
        codes = torch.randint(-128, 128, shape, dtype=torch.int8, **random)
        scale = (torch.rand(shape[:2], **random) + 0.5) / (64 * shape[2] ** 0.5)
        tensors[name] = {"weight": codes, "weight_scale": scale}
    wide = {n: t["weight"].double() * t["weight_scale"].double()[..., None] for n, t in tensors.items()}
    x = randn(1, tokens, hidden + 4)[:, 4:]
    extra = randn(2, tokens, hidden) if residual else None
    weights, ids = route(randn(3, tokens, experts, dtype=torch.float32), top_k, True)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64, device=DEVICE)
    for token, row in enumerate(quantised(x)):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            y = swiglu(wide["gate_up"][expert] @ row).to(BF16)  # rounded before it is quantised again
            expected[token] += weight * (wide["down"][expert] @ quantised(y[None])[0])
    if extra is not None:
        expected += extra.double()
    kernel = TritonW8A8Experts()
    out = kernel.apply(x, weights, ids, kernel.pack(tensors["gate_up"], tensors["down"]), residual=extra)
    # Products are exact; rounded are each expert's result and the sum. A hidden number on the border of two
    # codes moves by one of 127: a few of `width` make 1e-3.
    assert rel_error(out, expected) < 1e-3 + 2 * TINY[BF16]


@pytest.mark.parametrize("tokens", [1, 5, 18])
def test_w8a8(tokens: int) -> None:
    check_w8a8(tokens, experts=5, top_k=2, hidden=64, width=32, residual=tokens > 1)
    check_w8a8(tokens, experts=3, top_k=3, hidden=40, width=21, residual=True)


def test_codes_of_rows_are_their_definition() -> None:
    x = torch.cat((randn(0, 6, 70), torch.zeros(1, 70, device=DEVICE, dtype=BF16)))
    x = torch.cat((x, torch.arange(-35, 35, device=DEVICE)[None].to(BF16)))  # halves among the products
    codes, scale = quantise_rows(x)
    expected, expected_scale = quantize_per_token_int8(x)
    assert torch.equal(codes, expected)
    assert torch.equal(scale[:, None], expected_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_w8a8_shapes_of_qwen3_30b(tokens: int) -> None:
    check_w8a8(tokens, experts=128, top_k=8, hidden=2048, width=768, residual=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 500])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_shapes_of_qwen3_30b(tokens: int, bits: int) -> None:
    group = -1 if bits == 8 else 128
    check(tokens, experts=128, top_k=8, hidden=2048, width=768, bits=bits, group=group)
    if bits < 16:
        check(tokens, experts=128, top_k=8, hidden=2048, width=768, bits=bits, group=group, symmetric=False)
