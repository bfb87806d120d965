"""The CPU linear layer against float64, and its batch and thread invariance."""

from __future__ import annotations

import pytest
import torch
from cpu_support import needs_cpu_kernels, poisoned, randn, rel_error, rms_norm, threads
from torch import Tensor

from pymllm_kernels.cpu import CpuLinear

pytestmark = needs_cpu_kernels

# One rounding of the result to bf16 is 2^-9 at worst and about 1.7e-3 in the norm.
BF16_BOUND = 3e-3
# fp32 chains of up to 3072 bf16 products; measured below 3e-7.
FP32_BOUND = 2e-6


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    wide = x.double() if norm is None else rms_norm(x, *norm)
    y = wide @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if act == "silu_mul":
        gate, up = y.chunk(2, dim=-1)
        y = gate * torch.sigmoid(gate) * up
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("rows", [*range(1, 41), 513])
@pytest.mark.parametrize(
    ("n", "k"), [(32, 34), (48, 64), (100, 130), (7, 35), (96, 1024), (1, 2), (208, 600)]
)
def test_plain_matches_float64(rows: int, n: int, k: int) -> None:
    g = torch.Generator().manual_seed(rows * 1000 + n)
    x, weight = randn(g, rows, k), randn(g, n, k)
    linear = CpuLinear()
    packed = linear.pack(weight)
    expected = reference(x, weight)
    out = linear.apply(x, packed, out=poisoned(rows, n, torch.bfloat16))
    assert rel_error(out, expected) < BF16_BOUND
    out32 = linear.apply(x, packed, out_dtype=torch.float32, out=poisoned(rows, n, torch.float32))
    assert rel_error(out32, expected) < FP32_BOUND


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 2, 12, 13, 70, 800])
@pytest.mark.parametrize("act", [None, "silu_mul"])
@pytest.mark.parametrize(("n", "k"), [(2 * 24, 34), (2 * 100, 257), (2 * 49, 1030)])
def test_fusions_match_float64(seed: int, rows: int, act: str | None, n: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, bias = randn(g, n, k, scale=k**-0.5), randn(g, n)
    n_out = n // 2 if act else n
    x = randn(g, rows, k + 6)[:, 2 : k + 2]  # strided rows at an odd address
    norm = (randn(g, k), 1e-6)
    residual = randn(g, rows, n_out + 10)[:, 3 : n_out + 3]
    linear = CpuLinear()
    packed = linear.pack(weight, bias=bias, act=act)
    for use_norm in (None, norm):
        for use_residual in (None, residual):
            out = linear.apply(
                x,
                packed,
                norm=use_norm,
                residual=use_residual,
                out_dtype=torch.float32,
                out=poisoned(rows, n_out, torch.float32),
            )
            expected = reference(x, weight, bias, act, use_norm, use_residual)
            # With the norm an fp32 statistic may round a value of x to the other bf16.
            assert rel_error(out, expected) < (FP32_BOUND if use_norm is None else 5e-4)
            rounded = linear.apply(x, packed, norm=use_norm, residual=use_residual)
            assert torch.equal(rounded, out.to(torch.bfloat16))


@pytest.mark.parametrize("act", [None, "silu_mul"])
@pytest.mark.parametrize(("n", "k"), [(96, 1024), (1024, 3072), (130, 515)])
def test_rows_do_not_depend_on_batch_or_threads(act: str | None, n: int, k: int) -> None:
    g = torch.Generator().manual_seed(n)
    x, weight = randn(g, 1600, k), randn(g, n, k, scale=k**-0.5)
    norm = (randn(g, k), 1e-6)
    residual = randn(g, 1600, n // 2 if act else n)
    linear = CpuLinear()
    packed = linear.pack(weight, bias=randn(g, n), act=act)

    def run(rows: slice) -> Tensor:
        return linear.apply(x[rows], packed, norm=norm, residual=residual[rows], out_dtype=torch.float32)

    whole = run(slice(0, 1600))
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(run(slice(0, 1600)), whole)
            for start, rows in [(0, 1), (5, 1), (3, 2), (0, 8), (7, 12), (1, 13), (9, 40), (11, 512)]:
                part = slice(start, start + rows)
                assert torch.equal(run(part), whole[part]), (count, start, rows)


def test_pack_copies_strided_weights() -> None:
    g = torch.Generator().manual_seed(0)
    wide = randn(g, 64, 200)
    x = randn(g, 4, 100)
    linear = CpuLinear()
    packed = linear.pack(wide[:, 50:150])
    transposed = linear.pack(wide[:, 50:150].T.contiguous().T)
    expected = reference(x, wide[:, 50:150])
    wide.fill_(float("nan"))
    assert rel_error(linear.apply(x, packed), expected) < BF16_BOUND
    assert torch.equal(linear.apply(x, packed), linear.apply(x, transposed))


def test_nan_in_a_row_stays_in_that_row() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = randn(g, 9, 64), randn(g, 40, 64)
    x[4, 3] = float("nan")
    linear = CpuLinear()
    out = linear.apply(x, linear.pack(weight))
    assert out[4].isnan().all()
    assert not out[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


def test_no_rows() -> None:
    linear = CpuLinear()
    packed = linear.pack(torch.zeros(32, 32, dtype=torch.bfloat16))
    assert linear.apply(torch.empty(0, 32, dtype=torch.bfloat16), packed).shape == (0, 32)


def test_wrong_arguments_are_refused() -> None:
    linear = CpuLinear()
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="act must be"):
        linear.pack(weight, act="gelu")
    with pytest.raises(ValueError, match=r"2-D torch\.bfloat16"):
        linear.pack(weight.float())
    with pytest.raises(ValueError, match="bias must have shape"):
        linear.pack(weight, bias=torch.zeros(31))
    packed = linear.pack(weight)
    for bad in (weight[:, :30], weight.float(), weight.T[:]):
        with pytest.raises(ValueError, match="x must be"):
            linear.apply(bad, packed)
    with pytest.raises(ValueError, match="residual must be"):
        linear.apply(weight, packed, residual=weight[:3])
    with pytest.raises(ValueError, match="norm weight must be"):
        linear.apply(weight, packed, norm=(weight[0, :3], 1e-6))
    with pytest.raises(ValueError, match="out_dtype"):
        linear.apply(weight, packed, out_dtype=torch.float16)
