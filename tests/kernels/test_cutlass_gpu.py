"""The CUTLASS int8 product and the W8A8 node over it, on a GPU, to the last bit.

The libraries come from a bundle, the cache or a compiler; without any of them the tests fail, and say so.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from w8a8_support import Case, check, exact_product

from pymllm_core.nn.quant_ops import w8a8_epilogue
from pymllm_kernels.cutlass.gemm import MAX_K, Int8Gemm
from pymllm_kernels.cutlass.library import int8_gemm_kernel
from pymllm_kernels.cutlass.tiles import SM80_TILES, SM90_TILES, Capability, Tile
from pymllm_kernels.cutlass.w8a8 import FEW_ROWS, CutlassW8A8, CutlassW8A8Half

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HERE: Capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        HERE != (0, 0) and not (8, 0) <= HERE <= (9, 0), reason="the product is for 8.0 to 9.0"
    ),
]


def products() -> Iterator[tuple[Tile, Capability]]:
    """The tiles that run here. On Hopper the older ones do too: the driver compiles their PTX."""
    yield from ((tile, (8, 0) if HERE == (9, 0) else HERE) for tile, _ in SM80_TILES)
    if HERE in ((0, 0), (9, 0)):
        yield from ((tile, (9, 0)) for tile, _ in SM90_TILES)


every_tile = pytest.mark.parametrize(
    ("tile", "capability"), [pytest.param(*item, id=item[0].name) for item in products()]
)


def codes(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, device="cuda", dtype=torch.int8)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def check_product(gemm: Int8Gemm, shape: tuple[int, int, int], *, seed: int, parts: int) -> None:
    """Every part of the epilogue where its bit of `parts` is set; the output starts as NaN."""
    m, n, k = shape
    a, b = codes(seed, m, k), codes(seed + 1, n, k)
    rows = m if parts & 8 else 1
    a_scale, b_scale = normal(seed + 2, rows, 1).abs() / 127, normal(seed + 3, n).abs() / 127
    zero_point = b_sum = bias = residual = None
    if parts & 1:  # rows far from zero: the correction exceeds int32
        zero_point = (normal(seed + 4, rows, 1) * 50000).to(torch.int32)
        b_sum = b.sum(1, dtype=torch.int32)
    if parts & 2:
        bias = normal(seed + 5, n)
    if parts & 4:  # rows of a wider tensor
        residual = normal(seed + 6, m, n + 64).to(gemm.out_dtype)[:, :n]
    expected = w8a8_epilogue(exact_product(a, b), a_scale, zero_point, b_scale, b_sum, bias)
    if residual is not None:
        expected = expected + residual.float()
    out = torch.full((m, n), float("nan"), dtype=gemm.out_dtype, device="cuda")
    gemm(a, b, a_scale, b_scale, zero_point=zero_point, b_sum=b_sum, bias=bias, residual=residual, out=out)
    differ = int((out != expected.to(gemm.out_dtype)).sum())
    assert not differ, f"M={m} N={n} K={k} parts={parts:04b}: {differ} of {out.numel()} differ"


@every_tile
def test_every_part_of_the_epilogue(tile: Tile, capability: Capability) -> None:
    gemm = int8_gemm_kernel(tile, BF16, capability)
    shapes = [(1, 16, 16), (17, 144, 272), (129, 272, 4096), (257, 4112, 528)]
    for number, (shape, parts) in enumerate(itertools.product(shapes, range(16))):
        check_product(gemm, shape, seed=7 * number, parts=parts)


@every_tile
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 12288), (1024, 3072)])
def test_shapes_of_models(tile: Tile, capability: Capability, n: int, k: int) -> None:
    gemm = int8_gemm_kernel(tile, BF16, capability)
    for seed, m in enumerate((17, 63, 64, 65, 333, 1001)):
        check_product(gemm, (m, n, k), seed=100 * seed, parts=14 if seed % 2 else 8)


@every_tile
def test_largest_sums_fit(tile: Tile, capability: Capability) -> None:
    gemm = int8_gemm_kernel(tile, BF16, capability)
    a = torch.full((130, MAX_K), -128, dtype=torch.int8, device="cuda")
    b = torch.full((144, MAX_K), -128, dtype=torch.int8, device="cuda")
    scale = torch.full((130,), 2.0**-20, device="cuda")
    out = gemm(a, b, scale, torch.ones(144, device="cuda"))
    assert torch.equal(out, torch.full_like(out, 1024))  # 2^14 · 2^16 · 2^-20


@every_tile
def test_result_does_not_depend_on_other_rows(tile: Tile, capability: Capability) -> None:
    gemm = int8_gemm_kernel(tile, BF16, capability)
    a, b = codes(0, 300, 1024), codes(1, 1024, 1024)
    a_scale, b_scale = normal(2, 300).abs(), normal(3, 1024).abs()
    whole = gemm(a, b, a_scale, b_scale)
    assert torch.equal(gemm(a[170:], b, a_scale[170:], b_scale), whole[170:])


def test_what_does_not_fit_is_an_error() -> None:
    tile, capability = list(products())[-1]
    gemm = int8_gemm_kernel(tile, BF16, capability)
    a, b, one = codes(0, 32, 64), codes(1, 32, 64), torch.ones(32, device="cuda")
    for change, message in (
        ({"a": codes(0, 32, 65)[:, :64]}, "a must be"),
        ({"b": codes(0, 24, 64), "b_scale": torch.ones(24, device="cuda")}, "multiples of 16"),
        ({"b_scale": one.double()}, "b_scale must be"),
        ({"zero_point": one.int()}, "belong together"),
        ({"residual": torch.ones(32, 32, device="cuda")}, "residual must be"),
    ):
        arguments = {"a": a, "b": b, "a_scale": one, "b_scale": one} | change
        with pytest.raises(ValueError, match=message):
            gemm(**arguments)  # type: ignore[arg-type]


# ---- the node ----


@functools.cache
def node(dtype: torch.dtype) -> CutlassW8A8:
    return CutlassW8A8() if dtype == BF16 else CutlassW8A8Half()


FLAGS = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": True, "residual": True}, id="bias-residual"),
    pytest.param({"asymmetric": True, "residual": True}, id="asymmetric"),
    pytest.param({"static": True, "bias": True}, id="static"),
    pytest.param({"static": True, "asymmetric": True}, id="static-asymmetric"),
    pytest.param({"norm": True}, id="norm"),
    pytest.param({"act": "silu_mul", "norm": True}, id="silu_mul"),
    pytest.param({"act": "silu_mul", "bias": True, "residual": True, "asymmetric": True}, id="silu_mul-all"),
]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("flags", FLAGS)
def test_node(dtype: torch.dtype, flags: dict[str, bool | str]) -> None:
    for seed, rows in enumerate((1, FEW_ROWS, FEW_ROWS + 1, 63, 129, 1001)):
        if rows <= FEW_ROWS and "norm" not in flags:
            continue  # Triton's kernels have tests of their own, and other roundings; here only that they are called
        check(node(dtype), Case(rows=rows, n=2048, k=1040, seed=seed, dtype=dtype, **flags))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [17, 300])
def test_node_in_a_graph(rows: int) -> None:
    weight = {"weight": codes(0, 1024, 512), "weight_scale": normal(1, 1024).abs() * 1e-3}
    packed = node(BF16).pack(weight, act="silu_mul")
    x = normal(2, rows, 512).to(BF16)
    expected = node(BF16).apply(x, packed).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = node(BF16).apply(x, packed)
    out.fill_(float("nan"))
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_product_on_another_stream() -> None:
    """What is queued before it on the stream is seen, although the stream is not the default one."""
    tile, capability = list(products())[-1]
    gemm = int8_gemm_kernel(tile, BF16, capability)
    b, ones = codes(1, 4096, 4096), torch.ones(4096, device="cuda")
    wanted = codes(0, 4096, 4096)
    a = torch.zeros_like(wanted)
    expected = gemm(wanted, b, ones, ones)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(50):  # keeps the stream busy
            gemm(a, b, ones, ones)
        a.copy_(wanted)
        out = gemm(a, b, ones, ones)
    stream.synchronize()
    assert torch.equal(out, expected)
