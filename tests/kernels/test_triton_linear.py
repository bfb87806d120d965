"""The Triton linear against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE, TINY, randn, rel_error, rms_norm, swiglu

from pymllm_kernels.triton import linear
from pymllm_kernels.triton.linear import TritonLinear
from pymllm_kernels.triton.linear_plan import Blocks

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
) -> Tensor:
    wide = x.double() if norm is None else rms_norm(x, *norm)
    y = wide @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if act is not None:
        y = swiglu(y)
    return y if residual is None else y + residual.double()


def check(
    rows: int,
    n: int,
    k: int,
    *,
    seed: int = 0,
    act: str | None = None,
    norm: bool = False,
    bias: bool = False,
    residual: bool = False,
    dtype: torch.dtype = BF16,
    out_dtype: torch.dtype | None = None,
    magnitude: float = 1.0,
) -> None:
    results = n // 2 if act else n
    x = randn(seed, rows, k + 16, dtype=dtype, scale=magnitude)[:, 8 : k + 8]  # rows that lie apart
    weight = randn(seed + 1, n, k, dtype=dtype, scale=k**-0.5)
    b = randn(seed + 2, n, dtype=dtype) if bias else None
    r = randn(seed + 3, rows, results + 5, dtype=dtype)[:, 3 : results + 3] if residual else None
    gain = (randn(seed + 4, k, dtype=dtype), 1e-6) if norm else None
    node = TritonLinear()
    packed = node.pack({"weight": weight} | ({"bias": b} if b is not None else {}), act=act)
    # The kernel may overwrite its residual.
    out = node.apply(x, packed, norm=gain, residual=None if r is None else r.clone(), out_dtype=out_dtype)
    assert out.shape == (rows, results)
    assert out.dtype == (out_dtype or dtype)
    # One rounding of the result. With several rows, one of x · gain; with many, cuBLAS between kernels
    # rounds the norm twice and the product once.
    roundings = (out.dtype != F32) + (rows > 1) * norm + (rows > linear.MAX_FEW_ROWS) * 2
    # 1e-6 for float32 sums. Tensor cores cut off what they add, 16 columns at a time, instead of rounding it (Fasi,
    # Higham, Mikaitis and Pranesh, PeerJ Computer Science 7:e330, 2021): all errors have one sign, and grow with K.
    sums = 1e-6 if rows == 1 or DEVICE.type == "cpu" else 1e-6 + k / 16 * TINY[F32] / 2
    bound = sums + TINY[dtype] * roundings
    assert rel_error(out, reference(x, weight, b, act, gain, r)) < bound


@pytest.mark.parametrize("rows", range(1, 19))
def test_every_number_of_rows(rows: int) -> None:
    check(rows, 40, 72, seed=rows, act="silu_mul", norm=True, bias=True, residual=True)
    check(rows, 33, 136, seed=rows, norm=True, out_dtype=F32)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(("n", "k"), [(1, 8), (2, 34), (70, 200), (48, 1024), (34, 1536), (18, 2560)])
@pytest.mark.parametrize("act", [None, "silu_mul"])
def test_odd_sizes(rows: int, n: int, k: int, act: str | None) -> None:
    n = n + n % 2 if act else n
    check(rows, n, k, seed=n, act=act, norm=True, residual=True)
    check(rows, n, k, seed=n, act=act, out_dtype=F32)


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_fusions_one_by_one(rows: int) -> None:
    for seed, options in enumerate(
        (
            {"act": "silu_mul"},
            {"norm": True},
            {"bias": True},
            {"residual": True},
            {"bias": True, "residual": True},
        )
    ):
        check(rows, 24, 64, seed=seed, dtype=F16, **options)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("magnitude", [3e-3, 3e3])
def test_norm_of_extreme_rows_fits_float16(rows: int, magnitude: float) -> None:
    check(rows, 32, 64, dtype=F16, norm=True, magnitude=magnitude)


@pytest.mark.parametrize(
    "blocks", [Blocks(4, 64, 4, stages=3), Blocks(2, 256, 2, unroll=2), Blocks(8, 128, 4, stages=2, unroll=2)]
)
def test_any_blocks_of_the_table_are_right(blocks: Blocks) -> None:
    node = TritonLinear()
    x, weight = randn(0, 1, 328), randn(1, 20, 328)
    out = torch.full((1, 20), float("nan"), dtype=F32, device=DEVICE)
    linear.matvec(x, node.pack({"weight": weight}, act=None), None, None, out, blocks)
    assert rel_error(out, reference(x, weight, None, None, None, None)) < 1e-6


def test_no_rows() -> None:
    node = TritonLinear()
    packed = node.pack({"weight": randn(0, 8, 16)}, act=None)
    assert node.apply(randn(1, 0, 16), packed).shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 300])
@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (6144, 1024), (1024, 3072), (2560, 9728), (4096, 12288)])
def test_shapes_of_models(rows: int, n: int, k: int) -> None:
    for seed in range(3):
        check(rows, n, k, seed=seed, norm=True, residual=True)
        check(rows, n, k, seed=seed, act="silu_mul", norm=True)
        check(rows, n, k, seed=seed, dtype=F16, bias=True, out_dtype=F32)
