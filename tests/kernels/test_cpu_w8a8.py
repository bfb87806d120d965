"""The CPU linear layer of int8 weights and activations against its definition, bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cpu_support import needs_cpu_kernels, poisoned, randn, threads
from torch import Tensor

from pymllm_core.nn.quant_ops import quantize_activation, w8a8_epilogue
from pymllm_kernels.cpu import CpuLinear, CpuW8A8Linear

pytestmark = needs_cpu_kernels

ACTIVATIONS = list(product((False, True), (False, True)))  # static, symmetric


def tensors_of(
    n: int, k: int, *, static: bool = False, symmetric: bool = True, bias: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    tensors = {"weight": weight, "weight_scale": torch.rand(n, generator=g) * 0.01 + 0.001}
    if bias:
        tensors["bias"] = randn(g, n)
    if not symmetric:
        tensors["weight_sum"] = weight.sum(1, dtype=torch.int32)
    if static:
        tensors["input_scale"] = torch.tensor(0.027)
        if not symmetric:
            tensors["input_zero_point"] = torch.tensor(-17, dtype=torch.int32)
    return tensors


def expected(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The definition in float32, the integer product in float64, which holds it exactly."""
    sums = tensors.get("weight_sum")
    codes, scale, zero_point = quantize_activation(
        x,
        asymmetric=sums is not None,
        scale=tensors.get("input_scale"),
        zero_point=tensors.get("input_zero_point"),
    )
    exact = (codes.double() @ tensors["weight"].double().T).to(torch.int32)
    return w8a8_epilogue(exact, scale, zero_point, tensors["weight_scale"], sums, tensors.get("bias"))


def normalised(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """x as the kernels normalise it: their bf16 linear with the identity, which is exact."""
    linear = CpuLinear()
    return linear.apply(x, linear.pack(torch.eye(x.shape[1]).bfloat16()), norm=norm)


def silu_mul(y: Tensor) -> Tensor:
    gate, up = y.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("rows", [*range(1, 41), 513])
@pytest.mark.parametrize(
    ("n", "k"), [(32, 34), (48, 64), (100, 130), (7, 35), (96, 1024), (1, 1), (208, 601), (300, 4100)]
)
def test_the_bits_of_the_definition(rows: int, n: int, k: int) -> None:
    static, symmetric = ACTIVATIONS[rows % 4]
    x = randn(torch.Generator().manual_seed(rows), rows, k)
    tensors = tensors_of(n, k, static=static, symmetric=symmetric, seed=rows * 1000 + n)
    linear = CpuW8A8Linear()
    packed = linear.pack(dict(tensors))
    wanted = expected(x, tensors)
    out = linear.apply(x, packed, out_dtype=torch.float32, out=poisoned(rows, n, torch.float32))
    assert torch.equal(out, wanted)
    assert torch.equal(linear.apply(x, packed, out=poisoned(rows, n, torch.bfloat16)), wanted.bfloat16())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 2, 12, 13, 70, 800])
@pytest.mark.parametrize(("static", "symmetric"), ACTIVATIONS)
@pytest.mark.parametrize(("n", "k"), [(2 * 24, 34), (2 * 100, 257), (2 * 49, 1030)])
def test_fusions(seed: int, rows: int, static: bool, symmetric: bool, n: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = randn(g, rows, k + 6)[:, 2 : k + 2]  # strided rows at an odd address
    norm = (randn(g, k), 1e-6)
    linear = CpuW8A8Linear()
    for bias, act in product((False, True), (None, "silu_mul")):
        tensors = tensors_of(n, k, static=static, symmetric=symmetric, bias=bias, seed=seed)
        packed = linear.pack(dict(tensors), act=act)
        columns = n // 2 if act else n
        residual = randn(g, rows, columns + 10)[:, 3 : columns + 3]
        for use_norm, use_residual in product((None, norm), (None, residual)):
            y = expected(x if use_norm is None else normalised(x, norm), tensors)
            out = linear.apply(
                x,
                packed,
                norm=use_norm,
                residual=use_residual,
                out_dtype=torch.float32,
                out=poisoned(rows, columns, torch.float32),
            )
            if act is None:
                assert torch.equal(out, y if use_residual is None else y + use_residual.float())
            else:
                wide = silu_mul(y) if use_residual is None else silu_mul(y) + use_residual.double()
                # e^x is accurate to 2e-7, and a few float32 operations follow.
                size = silu_mul(y).abs() + wide.abs()
                assert bool(((out.double() - wide).abs() <= 1e-6 * size + 1e-30).all())
            rounded = linear.apply(x, packed, norm=use_norm, residual=use_residual)
            assert torch.equal(rounded, out.bfloat16())


def special_rows(k: int) -> Tensor:
    """Rows at the borders of the quantisation."""
    g = torch.Generator().manual_seed(0)
    rows = randn(g, 14, k)
    rows[0] = 0
    rows[1] = 3.0  # no range
    rows[2] = -3.0
    rows[3] = 1e30
    rows[4] *= 1e-30
    rows[5, ::2], rows[5, 1::2] = -1.0, 1.0
    rows[6] = 1000.0  # a zero point far outside of int8
    rows[6, 0] = 1004.0
    rows[7] = -1000.0
    rows[7, -1] = -996.0
    rows[8] = torch.arange(k).remainder(255).sub(127).bfloat16()  # codes as they are
    rows[9] = (torch.arange(k).remainder(254).sub(127) + 0.5).bfloat16()  # halves, to even
    rows[9, 0] = 127.0
    rows[10, 0] = 3e38
    rows[11] = -0.0
    rows[12] = rows[12].abs()
    rows[13] = -rows[13].abs()
    return rows


@pytest.mark.parametrize(("static", "symmetric"), ACTIVATIONS)
@pytest.mark.parametrize("code", [-128, -127, 0, 127, None])
@pytest.mark.parametrize("k", [64, 3072, 1 << 16])
def test_extremes(static: bool, symmetric: bool, code: int | None, k: int) -> None:
    tensors = tensors_of(33, k, static=static, symmetric=symmetric)
    if code is not None:
        tensors["weight"].fill_(code)
        if not symmetric:
            tensors["weight_sum"].fill_(code * k)
    linear, x = CpuW8A8Linear(), special_rows(k)
    packed = linear.pack(dict(tensors))
    out = linear.apply(x, packed, out_dtype=torch.float32)
    assert torch.equal(out, expected(x, tensors))
    for row in range(len(x)):
        alone = linear.apply(x[row : row + 1], packed, out_dtype=torch.float32)
        assert torch.equal(alone, out[row : row + 1]), row


@pytest.mark.parametrize("act", [None, "silu_mul"])
@pytest.mark.parametrize(("n", "k"), [(96, 1024), (1024, 3072), (130, 515)])
def test_rows_do_not_depend_on_batch_or_threads(act: str | None, n: int, k: int) -> None:
    g = torch.Generator().manual_seed(n)
    x, norm = randn(g, 1600, k), (randn(g, k), 1e-6)
    residual = randn(g, 1600, n // 2 if act else n)
    linear = CpuW8A8Linear()
    packed = linear.pack(tensors_of(n, k, bias=True), act=act)

    def run(rows: slice) -> Tensor:
        return linear.apply(x[rows], packed, norm=norm, residual=residual[rows], out_dtype=torch.float32)

    whole = run(slice(0, 1600))
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(run(slice(0, 1600)), whole)
            for start, rows in [(0, 1), (5, 1), (3, 2), (0, 8), (7, 12), (1, 13), (9, 40), (11, 512)]:
                part = slice(start, start + rows)
                assert torch.equal(run(part), whole[part]), (count, start, rows)


@pytest.mark.parametrize("symmetric", [False, True])
def test_nan_in_a_row_stays_in_that_row(symmetric: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = randn(g, 9, 64)
    x[4, 3] = float("nan")
    linear = CpuW8A8Linear()
    out = linear.apply(x, linear.pack(tensors_of(40, 64, symmetric=symmetric)))
    assert out[4].isnan().all()
    assert not out[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


def test_pack_copies() -> None:
    tensors = tensors_of(64, 200, symmetric=False)
    x = randn(torch.Generator().manual_seed(1), 4, 200)
    linear = CpuW8A8Linear()
    wanted = expected(x, tensors)
    packed = linear.pack(dict(tensors))
    for tensor in tensors.values():
        tensor.fill_(1)
    assert torch.equal(linear.apply(x, packed, out_dtype=torch.float32), wanted)


def test_wrong_arguments_are_refused() -> None:
    linear = CpuW8A8Linear()
    with pytest.raises(ValueError, match=r"2-D torch\.int8"):
        linear.pack({**tensors_of(4, 8), "weight": torch.zeros(4, 8)})
    with pytest.raises(ValueError, match="weight_scale"):
        linear.pack({**tensors_of(4, 8), "weight_scale": torch.zeros(3)})
    with pytest.raises(ValueError, match="needs input_scale and weight_sum"):
        linear.pack({**tensors_of(4, 8), "input_zero_point": torch.tensor(1)})
    with pytest.raises(ValueError, match="not known to this kernel: zero_point"):
        linear.pack({**tensors_of(4, 8), "zero_point": torch.zeros(4, 1)})
    with pytest.raises(ValueError, match="65537 columns"):
        linear.pack(tensors_of(1, (1 << 16) + 1))
