"""The Triton W8A8, W4A16 and W8A16 linears against `nn.quant_ops` in float64."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE, TINY, randn, rel_error, rms_norm, swiglu

from pymllm_core.nn import quant_ops
from pymllm_kernels.triton import w4a16, widened
from pymllm_kernels.triton.linear_plan import MAX_FEW_ROWS, Blocks
from pymllm_kernels.triton.quantize import StaticInput, quantize_rows
from pymllm_kernels.triton.w4a16 import TritonW4A16
from pymllm_kernels.triton.w4a16_kernels import widening
from pymllm_kernels.triton.w8a8 import TritonW8A8
from pymllm_kernels.triton.w8a16 import TritonW8A16

BF16, F32 = torch.bfloat16, torch.float32


def integers(seed: int, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype).to(DEVICE)


def epilogue(y: Tensor, act: str | None, residual: Tensor | None) -> Tensor:
    y = swiglu(y.double()) if act else y.double()
    return y if residual is None else y + residual.double()


def check_w8a8(
    rows: int, n: int, k: int, *, seed: int, static: bool, asymmetric: bool, act: str | None, norm: bool
) -> None:
    x = randn(seed, rows, k + 4, scale=3.0)[:, 4:] + (2 if asymmetric else 0)
    tensors = {
        "weight": integers(seed, -128, 128, n, k, dtype=torch.int8),
        "weight_scale": randn(seed + 1, n, dtype=F32).abs() * 1e-4,
        "bias": randn(seed + 2, n),
    }
    weight = tensors["weight"].double()
    if asymmetric:
        tensors["weight_sum"] = tensors["weight"].sum(1, dtype=torch.int32)
    if static:
        tensors["input_scale"] = torch.tensor(0.05, device=DEVICE)
        if asymmetric:
            tensors["input_zero_point"] = torch.tensor(-30, dtype=torch.int32, device=DEVICE)
    gain = (randn(seed + 3, k).abs() + 0.1, 1e-6) if norm else None
    residual = randn(seed + 4, rows, n // 2 if act else n)
    node = TritonW8A8()
    out = node.apply(x, node.pack(dict(tensors), act=act), norm=gain, residual=residual, out_dtype=F32)
    codes, scale, zero = quant_ops.quantize_activation(
        (x if gain is None else rms_norm(x, *gain)).float(),
        asymmetric=asymmetric,
        scale=tensors.get("input_scale"),
        zero_point=tensors.get("input_zero_point"),
    )
    product = (codes.double() @ weight.T).long()
    y = quant_ops.w8a8_epilogue(
        product, scale, zero, tensors["weight_scale"], tensors.get("weight_sum"), tensors["bias"]
    )
    # Integers are exact, so only the float32 epilogue differs; a norm may move a value over the border of a
    # code, by a last bit, which is 1 / 127 of one of `k` terms.
    bound = 1e-5 + (2 / 127 / k**0.5 if norm else 0.0)
    assert rel_error(out, epilogue(y, act, residual)) < bound


SCHEMES = list(itertools.product((False, True), (False, True)))


@pytest.mark.parametrize(("static", "asymmetric"), SCHEMES)
@pytest.mark.parametrize("rows", [1, 2, 17, 66])
@pytest.mark.parametrize("act", [None, "silu_mul"])
def test_w8a8(static: bool, asymmetric: bool, rows: int, act: str | None) -> None:
    n, k = (34, 300) if rows in (1, 17) else (40, 96)
    for norm in (False, True):
        check_w8a8(rows, n, k, seed=rows, static=static, asymmetric=asymmetric, act=act, norm=norm)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_w8a8_of_long_rows_of_several_blocks(asymmetric: bool) -> None:
    check_w8a8(1, 6, 4160, seed=0, static=False, asymmetric=asymmetric, act="silu_mul", norm=True)
    check_w8a8(1, 5, 3072, seed=1, static=False, asymmetric=asymmetric, act=None, norm=False)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_rows_without_range(asymmetric: bool) -> None:
    x = torch.stack([torch.zeros(48), torch.full((48,), 3.5), torch.full((48,), -2.0)]).to(BF16).to(DEVICE)
    x[1, 7] += 0 if asymmetric else 1
    codes, scales, zeros = quantize_rows(x, None, StaticInput(None, None), asymmetric=asymmetric)
    expected = quant_ops.quantize_activation(x, asymmetric=asymmetric, scale=None, zero_point=None)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1][:, 0])
    if zeros is not None and expected[2] is not None:
        assert torch.equal(zeros, expected[2][:, 0].float())


@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_are_those_of_the_definition(asymmetric: bool) -> None:
    """Without a norm all steps are defined to the last bit, ties included (half of a bfloat16 maximum)."""
    x = randn(0, 64, 96, scale=3.0) + (5 if asymmetric else 0)
    codes, scales, _ = quantize_rows(x, None, StaticInput(None, None), asymmetric=asymmetric)
    expected = quant_ops.quantize_activation(x, asymmetric=asymmetric, scale=None, zero_point=None)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1][:, 0])


def check_weight_only(
    bits: int,
    rows: int,
    n: int,
    k: int,
    groups: int,
    *,
    seed: int,
    asymmetric: bool,
    act: str | None,
    norm: bool,
    dtype: torch.dtype = BF16,
) -> None:
    x = randn(seed, rows, k + 4, dtype=dtype)[:, 4:]
    scale = randn(seed + 1, n, groups, dtype=F32).abs() * 0.02 + 0.01
    tensors = {"scale": (scale / 2 ** (bits - 4)).to(dtype), "bias": randn(seed + 2, n, dtype=dtype)}
    low = -(1 << bits - 1)
    if bits == 4:
        tensors["weight"] = integers(seed, 0, 256, n, k // 2, dtype=torch.uint8)
        codes = quant_ops.unpack_int4(tensors["weight"], k)
    else:
        codes = tensors["weight"] = integers(seed, low, -low, n, k, dtype=torch.int8)
    if asymmetric:
        tensors["zero_point"] = integers(seed + 3, low, -low, n, groups, dtype=torch.int8)
    gain = (randn(seed + 4, k, dtype=dtype), 1e-6) if norm else None
    residual = randn(seed + 5, rows, n // 2 if act else n, dtype=dtype)
    node = TritonW4A16() if bits == 4 else TritonW8A16()
    out = node.apply(x, node.pack(dict(tensors), act=act), norm=gain, residual=residual, out_dtype=F32)
    weight = quant_ops.dequantize(codes, tensors["scale"].double(), tensors.get("zero_point"))
    y = (x.double() if gain is None else rms_norm(x, *gain)) @ weight.T + tensors["bias"].double()
    # Codes are exact, sums in float32. What is rounded: x normed, twice where a kernel of its own does it; of 8
    # bits in few rows the weights and x normed, in one row nothing; for cuBLAS the weights and the product.
    # An activation multiplies two such results.
    if bits == 4:
        roundings = norm * (1 + (rows > 1)) + (rows > w4a16.MAX_FEW_ROWS) * 2
    else:
        roundings = (rows > 1) * (1 + norm) + (rows > MAX_FEW_ROWS) * (1 + norm)
    bound = (2e-6 + TINY[dtype] * roundings) * (1.5 if act else 1.0)
    assert rel_error(out, epilogue(y, act, residual)) < bound


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 17, 33, 65])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "groups"),
    # Groups of 32, 64, 96, 128 and 640 columns, and whole rows; widths that end within a unit of 128.
    [(42, 128, 4), (18, 320, 1), (6, 1280, 10), (10, 576, 9), (14, 288, 3), (66, 1280, 2), (42, 32, 1)],
)
def test_w4a16(rows: int, asymmetric: bool, n: int, k: int, groups: int) -> None:
    for act, norm, dtype in ((None, False, BF16), ("silu_mul", True, BF16), (None, True, torch.float16)):
        check_weight_only(
            4, rows, n, k, groups, seed=rows + n, asymmetric=asymmetric, act=act, norm=norm, dtype=dtype
        )


def test_w4a16_of_an_odd_number_of_results() -> None:
    for rows in range(1, 18):
        check_weight_only(4, rows, 35, 256, 2, seed=rows, asymmetric=True, act=None, norm=rows % 2 == 0)


def test_w4a16_rows_of_large_sums_fit_float16() -> None:
    """Before the division by its rms, x times the norm's weight would be infinite in float16."""
    x = randn(0, 1, 256, dtype=torch.float16, scale=3000.0)
    gain = randn(1, 256, dtype=torch.float16, scale=30.0)
    packed = integers(2, 0, 256, 6, 128, dtype=torch.uint8)
    scale = torch.full((6, 2), 0.01, dtype=torch.float16, device=DEVICE)
    node = TritonW4A16()
    weights = node.pack({"weight": packed, "scale": scale}, act=None)
    out = node.apply(x, weights, norm=(gain, 1e-6), out_dtype=F32)
    weight = quant_ops.dequantize(quant_ops.unpack_int4(packed, 256), scale.double())
    assert rel_error(out, rms_norm(x, gain, 1e-6) @ weight.T) < 2e-6 + TINY[torch.float16]


@pytest.mark.parametrize("minus_eight", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_ptx_widens_every_code(dtype: torch.dtype, minus_eight: bool) -> None:
    """The interpreter runs no PTX: here its few operations run on all words, in both halves of a register."""

    def value(bits: Tensor) -> Tensor:
        return bits.to(torch.int16).view(dtype).double()

    words, zero = torch.arange(0, 1 << 16), 5
    for nibble in range(4):
        text = widening.fn(nibble, dtype == BF16, minus_eight)
        shift = re.search(r"shr\.u32 t, \$1, (\d+);", text)
        lop = re.search(r"lop3\.b32 t, t, (\w+), (\w+), 0xEA;", text)
        one = re.search(r"mov\.b32 one, (\w+);", text)
        off = re.search(r"mov\.b32 off, (\w+|\$2);", text)
        assert lop
        assert one
        assert off
        offset = torch.tensor(-(136 if dtype == BF16 else 1032) - zero, dtype=dtype).view(torch.int16).item()
        for first in (words, words.flip(0)):
            register = first | (words << 16)
            t = ((register >> (int(shift[1]) if shift else 0)) & int(lop[1], 16)) | int(lop[2], 16)
            for half, codes in ((0, first), (16, words)):
                factor = int(one[1], 16) >> half & 0xFFFF
                addend = int(off[1], 16) >> half & 0xFFFF if minus_eight else int(offset) & 0xFFFF
                got = value(t >> half) * value(torch.tensor([factor])) + value(torch.tensor([addend]))
                expected = (codes >> (4 * nibble) & 15) - 8 - (0 if minus_eight else zero)
                assert torch.equal(got, expected.double())


@pytest.mark.parametrize("rows", [1, 3, 35])
@pytest.mark.parametrize("gated", [False, True])
def test_w4a16_writes_its_results_and_nothing_else(rows: int, gated: bool) -> None:
    n, k = 18, 384
    tensors = {
        "weight": integers(0, 0, 256, n, k // 2, dtype=torch.uint8),
        "scale": torch.full((n, 3), 0.01, dtype=BF16, device=DEVICE),
    }
    packed = TritonW4A16().pack(tensors, act="silu_mul" if gated else None)
    x = randn(1, rows, k)
    codes = quant_ops.unpack_int4(tensors["weight"], k)
    y = x.double() @ quant_ops.dequantize(codes, tensors["scale"].double()).T
    for block_n, units, warps, stages in ((16, 1, 1, 2), (16, 2, 1, 3), (32, 4, 4, 2)):
        results = packed.out_features
        out = torch.full((rows + 2, results), torch.nan, device=DEVICE)
        w4a16.few_rows(x, packed, None, None, out[1:-1], Blocks(block_n, units * 128, warps, stages))
        assert rel_error(out[1:-1], epilogue(y, "silu_mul" if gated else None, None)) < 3e-6
        assert out[0].isnan().all()
        assert out[-1].isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(40, 128, 4), (18, 330, 1), (6, 1280, 1), (10, 1584, 33)])
def test_w8a16(rows: int, asymmetric: bool, n: int, k: int, groups: int) -> None:
    for act, norm in ((None, False), ("silu_mul", True)):
        check_weight_only(8, rows, n, k, groups, seed=rows + n, asymmetric=asymmetric, act=act, norm=norm)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_widened_in_blocks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "WIDENED", 11 * 64)
    check_weight_only(bits, 70, 26, 64, 2, seed=0, asymmetric=True, act="silu_mul", norm=True)
    check_weight_only(bits, 70, 26, 64, 2, seed=1, asymmetric=True, act=None, norm=True)


def test_words_hold_every_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4a16, "PACKED", 3 * 64)
    packed = integers(0, 0, 256, 10, 96, dtype=torch.uint8)
    words = w4a16.to_words(packed).view(10, 2, 1, 32)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=DEVICE)[:, None]
    codes = ((words >> shifts) & 15).reshape(10, 256)[:, :192].to(torch.int8) - 8
    assert torch.equal(codes, quant_ops.unpack_int4(packed, 192))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 64, 65, 300])
@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (6144, 1024), (1024, 3072), (2560, 9728), (4096, 12288)])
def test_shapes_of_models(rows: int, n: int, k: int) -> None:
    for seed, (asymmetric, act) in enumerate(itertools.product((False, True), (None, "silu_mul"))):
        check_w8a8(rows, n, k, seed=seed, static=False, asymmetric=asymmetric, act=act, norm=seed % 2 == 0)
        for bits, groups in ((4, k // 128), (8, 1)):
            check_weight_only(
                bits, rows, n, k, groups, seed=seed, asymmetric=asymmetric, act=act, norm=seed % 2 == 0
            )


def test_many_rows_are_widened_in_whole_tiles() -> None:
    """At most WIDENED weights at a time, in rows that fill tiles, whatever the number of columns."""
    for columns in (64, 1024, 2560, 4096, 9728, 12288, 25600, 1 << 20):
        rows = widened.rows_at_a_time(columns, 151936)
        assert rows * columns <= widened.WIDENED
        assert rows % 2048 == 0 or (rows < 2048 and (rows % 256 == 0 or rows < 256)) or rows == 151936
        assert widened.rows_at_a_time(columns, 40) == min(rows, 40)
