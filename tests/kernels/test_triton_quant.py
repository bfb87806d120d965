"""The Triton W8A8, W4A16 and W8A16 linears against `nn.quant_ops` in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE, TINY, randn, rel_error, rms_norm, swiglu

from pymllm_core.nn import quant_ops
from pymllm_kernels.triton import w4a16, widened
from pymllm_kernels.triton.linear_plan import MAX_FEW_ROWS
from pymllm_kernels.triton.quantize import StaticInput, quantize_rows
from pymllm_kernels.triton.w4a16 import TritonW4A16
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
) -> None:
    x = randn(seed, rows, k + 4)[:, 4:]
    scale = randn(seed + 1, n, groups, dtype=F32).abs() * 0.02 + 0.01
    tensors = {"scale": (scale / 2 ** (bits - 4)).to(BF16), "bias": randn(seed + 2, n)}
    low = -(1 << bits - 1)
    if bits == 4:
        tensors["weight"] = integers(seed, 0, 256, n, k // 2, dtype=torch.uint8)
        codes = quant_ops.unpack_int4(tensors["weight"], k)
    else:
        codes = tensors["weight"] = integers(seed, low, -low, n, k, dtype=torch.int8)
    if asymmetric:
        tensors["zero_point"] = integers(seed + 3, low, -low, n, groups, dtype=torch.int8)
    gain = (randn(seed + 4, k), 1e-6) if norm else None
    residual = randn(seed + 5, rows, n // 2 if act else n)
    node = TritonW4A16() if bits == 4 else TritonW8A16()
    out = node.apply(x, node.pack(dict(tensors), act=act), norm=gain, residual=residual, out_dtype=F32)
    weight = quant_ops.dequantize(codes, tensors["scale"].double(), tensors.get("zero_point"))
    y = (x.double() if gain is None else rms_norm(x, *gain)) @ weight.T + tensors["bias"].double()
    # One row: float32 throughout. More: weights, and a norm's product, rounded to bfloat16; for cuBLAS the
    # norm twice, and the product. An activation multiplies two such results.
    roundings = (rows > 1) * (1 + norm) + (rows > MAX_FEW_ROWS) * (1 + norm)
    bound = (2e-6 + TINY[BF16] * roundings) * (1.5 if act else 1.0)
    assert rel_error(out, epilogue(y, act, residual)) < bound


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(40, 128, 4), (18, 320, 1), (6, 1280, 10), (10, 576, 9)])
def test_w4a16(rows: int, asymmetric: bool, n: int, k: int, groups: int) -> None:
    for act, norm in ((None, False), ("silu_mul", True)):
        check_weight_only(4, rows, n, k, groups, seed=rows + n, asymmetric=asymmetric, act=act, norm=norm)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(40, 128, 4), (18, 330, 1), (6, 1280, 1), (10, 1584, 33)])
def test_w8a16(rows: int, asymmetric: bool, n: int, k: int, groups: int) -> None:
    for act, norm in ((None, False), ("silu_mul", True)):
        check_weight_only(8, rows, n, k, groups, seed=rows + n, asymmetric=asymmetric, act=act, norm=norm)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_widened_in_blocks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "WIDENED", 11 * 64)
    check_weight_only(bits, 20, 26, 64, 2, seed=0, asymmetric=True, act="silu_mul", norm=True)


def test_words_hold_every_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4a16, "PACKED", 3 * 64)
    packed = integers(0, 0, 256, 10, 32, dtype=torch.uint8)
    words = w4a16.to_words(packed).view(10, 2, 1, 4)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=DEVICE)[:, None]
    codes = ((words >> shifts) & 15).reshape(10, 64).to(torch.int8) - 8
    assert torch.equal(codes, quant_ops.unpack_int4(packed, 64))


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
