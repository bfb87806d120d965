"""The CPU linear layers of 4-bit and 8-bit weights against float64, and their batch and thread invariance."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cpu_support import needs_cpu_kernels, poisoned, randn, rel_error, rms_norm, threads
from torch import Tensor

from pymllm_core.nn.quant_ops import dequantize, unpack_int4
from pymllm_kernels.cpu import CpuWeightOnlyLinear

pytestmark = needs_cpu_kernels

# One rounding of the result to bf16 is 2^-9 at worst and about 1.7e-3 in the norm.
BF16_BOUND = 3e-3
# fp32 chains of up to 3072 exact products; measured below 5e-7.
FP32_BOUND = 2e-6
BITS = (4, 8)

# n, k, groups
SHAPES = [
    (32, 64, 2),
    (48, 64, 1),
    (100, 130, 1),
    (7, 35, 1),
    (40, 48, 6),
    (96, 1024, 8),
    (70, 1024, 16),
    (33, 768, 24),
    (64, 2560, 5),
    (50, 2048, 2),
    (20, 4096, 2),
    (5, 8, 1),
    (5, 1, 1),
    (208, 601, 1),
]


def tensors_of(
    bits: int, n: int, k: int, groups: int, *, symmetric: bool = True, bias: bool = False, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors as `pack` gets them, and the weight [n, k] in float64."""
    g = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=g, dtype=torch.int8)
    scale = (torch.rand(n, groups, generator=g) * 0.01 + 0.001).bfloat16()
    tensors = {"weight": packed_int4(codes, g) if bits == 4 else codes, "scale": scale}
    zero_point = torch.zeros(n, groups, dtype=torch.int8)
    if not symmetric:
        zero_point = torch.randint(-half, half, (n, groups), generator=g, dtype=torch.int8)
        tensors["zero_point"] = zero_point
    if bias:
        tensors["bias"] = randn(g, n)
    return tensors, dequantize(codes, scale.double(), zero_point)


def packed_int4(codes: Tensor, g: torch.Generator) -> Tensor:
    """[n, k] to [n, 4 ceil(k / 8)] uint8, with anything behind the last column."""
    n, k = codes.shape
    padded = torch.randint(-8, 8, (n, -(-k // 8) * 8), generator=g, dtype=torch.int8)
    padded[:, :k] = codes
    unsigned = (padded + 8).to(torch.uint8)
    packed = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    assert torch.equal(unpack_int4(packed, k), codes)
    return packed


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    wide = x.double() if norm is None else rms_norm(x, *norm)
    y = wide @ weight.T
    if bias is not None:
        y = y + bias.double()
    if act == "silu_mul":
        gate, up = y.chunk(2, dim=-1)
        y = gate * torch.sigmoid(gate) * up
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [*range(1, 41), 513])
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_plain_matches_float64(bits: int, rows: int, n: int, k: int, groups: int) -> None:
    symmetric = bool(rows % 2)
    tensors, weight = tensors_of(bits, n, k, groups, symmetric=symmetric, seed=rows * 1000 + n)
    x = randn(torch.Generator().manual_seed(rows), rows, k)
    linear = CpuWeightOnlyLinear(bits)
    packed = linear.pack(dict(tensors))
    expected = reference(x, weight)
    out = linear.apply(x, packed, out=poisoned(rows, n, torch.bfloat16))
    assert rel_error(out, expected) < BF16_BOUND
    out32 = linear.apply(x, packed, out_dtype=torch.float32, out=poisoned(rows, n, torch.float32))
    assert rel_error(out32, expected) < FP32_BOUND
    assert torch.equal(out, out32.bfloat16())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 2, 12, 13, 70, 800])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(2 * 24, 34, 1), (2 * 100, 256, 8), (2 * 49, 1280, 10)])
def test_fusions_match_float64(
    bits: int, seed: int, rows: int, symmetric: bool, n: int, k: int, groups: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = randn(g, rows, k + 6)[:, 2 : k + 2]  # strided rows at an odd address
    norm = (randn(g, k), 1e-6)
    linear = CpuWeightOnlyLinear(bits)
    for use_bias, act in product((False, True), (None, "silu_mul")):
        tensors, weight = tensors_of(bits, n, k, groups, symmetric=symmetric, bias=use_bias, seed=seed)
        bias = tensors.get("bias")
        packed = linear.pack(dict(tensors), act=act)
        columns = n // 2 if act else n
        residual = randn(g, rows, columns + 10)[:, 3 : columns + 3]
        for use_norm, use_residual in product((None, norm), (None, residual)):
            out = linear.apply(
                x,
                packed,
                norm=use_norm,
                residual=use_residual,
                out_dtype=torch.float32,
                out=poisoned(rows, columns, torch.float32),
            )
            expected = reference(x, weight, bias, act, use_norm, use_residual)
            # With the norm an fp32 statistic may round a value of x to the other bf16.
            assert rel_error(out, expected) < (FP32_BOUND if use_norm is None else 5e-4)
            rounded = linear.apply(x, packed, norm=use_norm, residual=use_residual)
            assert torch.equal(rounded, out.bfloat16())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act", [None, "silu_mul"])
@pytest.mark.parametrize(
    ("n", "k", "groups"), [(96, 1024, 8), (256, 3072, 24), (256, 3072, 1), (130, 515, 1), (98, 1024, 32), (66, 2048, 2)]
)  # fmt: skip
def test_rows_do_not_depend_on_batch_or_threads(
    bits: int, symmetric: bool, act: str | None, n: int, k: int, groups: int
) -> None:
    g = torch.Generator().manual_seed(n)
    x, norm = randn(g, 900, k), (randn(g, k), 1e-6)
    residual = randn(g, 900, n // 2 if act else n)
    linear = CpuWeightOnlyLinear(bits)
    tensors, _ = tensors_of(bits, n, k, groups, symmetric=symmetric, bias=True)
    packed = linear.pack(tensors, act=act)

    def run(rows: slice) -> Tensor:
        return linear.apply(x[rows], packed, norm=norm, residual=residual[rows], out_dtype=torch.float32)

    whole = run(slice(0, 900))
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(run(slice(0, 900)), whole)
            for start, rows in [(0, 1), (5, 1), *((7, rows) for rows in range(2, 15)), (9, 40), (11, 512)]:
                part = slice(start, start + rows)
                assert torch.equal(run(part), whole[part]), (count, start, rows)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_every_code_at_every_place(bits: int, rows: int) -> None:
    """One column of x at a time, so that each result is one weight: exact."""
    half, k = 1 << (bits - 1), 40
    codes = (torch.arange(48 * k).view(48, k) * 7 % (2 * half) - half).to(torch.int8)
    assert codes.unique().numel() == 2 * half
    tensors = {
        "weight": packed_int4(codes, torch.Generator()) if bits == 4 else codes,
        "scale": torch.ones(48, 1, dtype=torch.bfloat16),
    }
    linear = CpuWeightOnlyLinear(bits)
    packed = linear.pack(tensors)
    for start in range(0, k, rows):
        x = torch.eye(k).bfloat16()[start : start + rows]
        out = linear.apply(x, packed, out_dtype=torch.float32)
        assert torch.equal(out, codes.float().T[start : start + rows])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize(("k", "groups"), [(512, 4), (512, 1), (500, 1)])
def test_zero_points_of_rows_far_from_zero(bits: int, rows: int, k: int, groups: int) -> None:
    """The zero point's share is subtracted after summing, which must not cost more than the sums' own errors."""
    tensors, weight = tensors_of(bits, 50, k, groups, symmetric=False)
    x = randn(torch.Generator().manual_seed(1), rows, k) + 30
    linear = CpuWeightOnlyLinear(bits)
    out = linear.apply(x, linear.pack(dict(tensors)), out_dtype=torch.float32)
    half = 1 << (bits - 1)
    # Sums of |x| times code and of |x| times zero point: no chain has more than 500 roundings of 2^-24, and
    # rounding errors of either sign leave far less than their sum.
    size = x.double().abs().sum(-1, keepdim=True) * 2 * half * tensors["scale"].double().amax(-1)
    assert bool(((out.double() - x.double() @ weight.T).abs() <= 1e-6 * size).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 2, 12, 13, 40])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(50, 256, 8), (32, 1024, 4), (10, 48, 2)])
def test_columns_in_any_order(
    bits: int, rows: int, symmetric: bool, equal: bool, n: int, k: int, groups: int
) -> None:
    """g_idx, in groups of one size as GPTQ writes them, and of any sizes."""
    g = torch.Generator().manual_seed(k)
    tensors, weight = tensors_of(bits, n, k, groups, symmetric=symmetric)
    codes = unpack_int4(tensors["weight"], k) if bits == 4 else tensors["weight"]
    g_idx = torch.arange(k) // (k // groups)
    if not equal:
        g_idx = torch.randint(0, groups - 1, (k,), generator=g)  # the last group has no column
    g_idx = g_idx[torch.randperm(k, generator=g)].to(torch.int32)
    zero_point = tensors.get("zero_point")
    weight = dequantize(codes, tensors["scale"].double(), zero_point, g_idx)
    x, norm = randn(g, rows, k), (randn(g, k), 1e-6)
    linear = CpuWeightOnlyLinear(bits)
    packed = linear.pack({**tensors, "g_idx": g_idx})
    out = linear.apply(x, packed, out_dtype=torch.float32, out=poisoned(rows, n, torch.float32))
    assert rel_error(out, reference(x, weight)) < FP32_BOUND
    out = linear.apply(x, packed, norm=norm, out_dtype=torch.float32)
    assert rel_error(out, reference(x, weight, norm=norm)) < 5e-4
    alone = linear.apply(x[-1:], packed, norm=norm, out_dtype=torch.float32)
    assert torch.equal(alone, out[-1:])


@pytest.mark.parametrize("bits", BITS)
def test_nan_in_a_row_stays_in_that_row(bits: int) -> None:
    for symmetric, groups in product((True, False), (1, 2)):
        tensors, _ = tensors_of(bits, 40, 64, groups, symmetric=symmetric)
        x = randn(torch.Generator().manual_seed(0), 9, 64)
        x[4, 3] = float("nan")
        linear = CpuWeightOnlyLinear(bits)
        out = linear.apply(x, linear.pack(tensors))
        assert out[4].isnan().all()
        assert not out[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("bits", BITS)
def test_pack_copies(bits: int) -> None:
    tensors, weight = tensors_of(bits, 64, 256, 2, symmetric=False, bias=True)
    x = randn(torch.Generator().manual_seed(1), 4, 256)
    linear = CpuWeightOnlyLinear(bits)
    expected = reference(x, weight, tensors["bias"])
    packed = linear.pack(dict(tensors))
    for tensor in tensors.values():
        tensor.fill_(1)
    assert rel_error(linear.apply(x, packed), expected) < BF16_BOUND


@pytest.mark.parametrize(("bits", "bits_a_weight"), [(4, 4 + 16 / 128), (8, 8 + 16 / 128)])
def test_memory_is_that_of_the_codes_and_scales(bits: int, bits_a_weight: float) -> None:
    tensors, _ = tensors_of(bits, 64, 1024, 8)
    assert CpuWeightOnlyLinear(bits).pack(tensors).nbytes == 64 * 1024 * bits_a_weight / 8


def test_wrong_arguments_are_refused() -> None:
    linear = CpuWeightOnlyLinear(4)
    tensors, _ = tensors_of(4, 16, 64, 2)
    with pytest.raises(ValueError, match=r"weight must be a 2-D torch\.uint8"):
        linear.pack({**tensors, "weight": torch.zeros(16, 32)})
    with pytest.raises(ValueError, match=r"scale must be a 2-D torch\.bfloat16"):
        linear.pack({**tensors, "scale": torch.zeros(16, 2)})
    with pytest.raises(ValueError, match="scale must have shape"):
        linear.pack({**tensors, "scale": torch.zeros(15, 2).bfloat16()})
    with pytest.raises(ValueError, match="zero_point must be int8"):
        linear.pack({**tensors, "zero_point": torch.zeros(16, 1, dtype=torch.int8)})
    with pytest.raises(ValueError, match="not known to this kernel: weight_scale"):
        linear.pack({**tensors, "weight_scale": torch.zeros(64)})
    for g_idx in (torch.zeros(63, dtype=torch.int32), torch.full((64,), 2), torch.full((64,), -1)):
        with pytest.raises(ValueError, match="g_idx must hold a group under 2 for each of 64 columns"):
            linear.pack({**tensors, "g_idx": g_idx})
    for groups in (3, 16):
        with pytest.raises(ValueError, match="a multiple of 8 columns"):
            linear.pack({**tensors, "scale": torch.ones(16, groups).bfloat16()})
    packed = linear.pack(tensors)
    with pytest.raises(ValueError, match="x must be"):
        linear.apply(torch.zeros(1, 63).bfloat16(), packed)
    alone = linear.pack(tensors_of(4, 16, 60, 1)[0])
    for k in (56, 65):
        with pytest.raises(ValueError, match="x must be"):
            linear.apply(torch.zeros(1, k).bfloat16(), alone)
