"""The CUTLASS W8A8 node around its product: Triton's part in the interpreter, the product in plain torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from w8a8_support import Case, check, exact_product

from pymllm_core.nn import quant_ops
from pymllm_kernels.cutlass import gemm, w8a8
from pymllm_kernels.cutlass.gemm import Int8GemmError
from pymllm_kernels.cutlass.tiles import SM80_TILES
from pymllm_kernels.cutlass.w8a8 import FEW_ROWS, CutlassW8A8, CutlassW8A8Half

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_cutlass_gpu.py tests the real product"
)


class Product:
    """What `Int8Gemm` computes, and its demands on types. calls: rows of each."""

    def __init__(self, dtype: torch.dtype, calls: list[int]) -> None:
        self.dtype, self.calls = dtype, calls

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        a_scale: Tensor,
        b_scale: Tensor,
        *,
        zero_point: Tensor | None = None,
        b_sum: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        assert a.dtype == b.dtype == torch.int8
        assert a.is_contiguous()
        assert a_scale.shape == a.shape[:1]
        assert (zero_point is None) == (b_sum is None)
        if zero_point is not None:
            assert zero_point.dtype == torch.int32
            zero_point = zero_point[:, None]
        assert bias is None or bias.dtype == torch.float32
        self.calls.append(a.shape[0])
        y = quant_ops.w8a8_epilogue(exact_product(a, b), a_scale[:, None], zero_point, b_scale, b_sum, bias)
        if residual is not None:
            assert residual.dtype == self.dtype
            assert residual.is_contiguous()
            y = y + residual.float()
        return y.to(self.dtype)


def node_of(dtype: torch.dtype) -> tuple[CutlassW8A8, list[int]]:
    node = CutlassW8A8() if dtype == torch.bfloat16 else CutlassW8A8Half()
    calls: list[int] = []
    product: Any = Product(dtype, calls)
    node.capability = (8, 7)
    node.gemms = {tile: product for tile, _ in SM80_TILES}
    return node, calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", [None, "silu_mul"])
@pytest.mark.parametrize(("static", "asymmetric"), [*itertools.product((False, True), repeat=2)])
def test_many_rows(dtype: torch.dtype, act: str | None, static: bool, asymmetric: bool) -> None:
    node, calls = node_of(dtype)
    for parts in (0, 3, 5, 6):  # every part on and off, beside every other one on and off
        case = Case(
            rows=17 + parts, n=64, k=48, seed=parts, dtype=dtype, static=static, asymmetric=asymmetric, act=act,
            bias=bool(parts & 1), norm=bool(parts & 2), residual=bool(parts & 4),
        )  # fmt: skip
        check(node, case)
    assert calls == [17, 20, 22, 23]


def test_few_rows_and_other_types_are_tritons() -> None:
    node, calls = node_of(torch.bfloat16)
    check(node, Case(rows=FEW_ROWS, n=32, k=64, bias=True, residual=True, norm=True))
    packed = node.pack(
        {"weight": torch.ones(32, 64, dtype=torch.int8), "weight_scale": torch.ones(32)}, act=None
    )
    x = torch.ones(20, 64, dtype=torch.bfloat16)
    assert node.apply(x, packed, out_dtype=torch.float32).dtype == torch.float32
    assert not calls
    assert node.apply(x, packed, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert calls == [20]


def test_residual_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    node, calls = node_of(torch.bfloat16)
    packed = node.pack(
        {"weight": torch.ones(32, 64, dtype=torch.int8), "weight_scale": torch.ones(32)}, act=None
    )
    wide = torch.ones(20, 40, dtype=torch.bfloat16)
    node.apply(torch.ones(20, 64, dtype=torch.bfloat16), packed, residual=wide[:, 4:36])
    assert calls == [20]


def test_first_pack_compiles_once_for_its_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_gemms(dtype: torch.dtype, capability: tuple[int, int]) -> dict[Any, Any]:
        asked.append((dtype, capability))
        return {tile: Product(dtype, []) for tile, _ in SM80_TILES}

    monkeypatch.setattr(w8a8, "load_gemms", load_gemms)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 7))
    node = CutlassW8A8Half()
    tensors = {"weight": torch.ones(32, 64, dtype=torch.int8), "weight_scale": torch.ones(32)}
    for _ in range(2):
        node.pack(dict(tensors), act=None)
    assert asked == [(torch.float16, (8, 7))]


def test_product_that_is_wrong_here_is_an_error_at_the_first_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = lambda a, *_: torch.zeros(a.shape[0], 16, dtype=torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(w8a8, "load_gemms", lambda *_: {SM80_TILES[0][0]: wrong})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 7))
    tensors = {"weight": torch.ones(32, 64, dtype=torch.int8), "weight_scale": torch.ones(32)}
    node = CutlassW8A8()
    for _ in range(2):  # it stays one
        with pytest.raises(Int8GemmError, match="of ones is wrong on cpu"):
            node.pack(tensors, act=None)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (1, "not supported by this tile"),
        (1035, "CUDA error 35: the driver is older"),
        (1700, "error 700: see cuda"),
    ],
)
def test_errors_of_a_launch_are_explained(status: int, message: str) -> None:
    assert message in gemm._reason(status)
