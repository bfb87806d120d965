"""The linear nodes of few rows in CUDA C++: on a GPU against float64; packing on any machine."""

from __future__ import annotations

import pytest
import torch
from few_rows_support import BF16, F32, NODES, TILED, TILES_OF, check, check_early_launches, randint, weights
from torch import Tensor
from triton_support import randn

from pymllm_kernels.cuda.few_rows import CudaW8A8
from pymllm_kernels.cuda.few_rows_library import FORMATS, UNIT, FewRows, Operand, Plan
from pymllm_kernels.cuda.int4_tiles import to_constants, to_tiles


@pytest.mark.gpu
@pytest.mark.parametrize("form", list(UNIT))
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65])
def test_every_number_of_rows(form: str, rows: int) -> None:
    check(form, rows, 48, 256, seed=rows, norm=True, residual=True)
    check(form, rows, 33, 384, seed=rows, gated=True, norm=True)
    check(form, rows, 130, 640, seed=rows, bias=True, out_dtype=F32)


@pytest.mark.gpu
@pytest.mark.parametrize("form", list(UNIT))
@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 128), (15, 128), (17, 1152), (1024, 2048), (2560, 9728), (4096, 3072), (8208, 1024)]
)
def test_odd_and_real_sizes(form: str, rows: int, n: int, k: int) -> None:
    check(form, rows, n, k, seed=n, norm=True, residual=True)
    check(form, rows, n, k, seed=n + 1, gated=True, bias=True, out_dtype=F32)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_row_that_is_too_long_for_the_norm(form: str) -> None:
    check(form, 1, 2050, 20480, norm=True)
    check(form, 1, 2050, 32768)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 6, 20, 70])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("zero_points", [False, True])
def test_groups(rows: int, group: int, zero_points: bool) -> None:
    check("int4", rows, 72, 1024, group=group, zero_points=zero_points, norm=True)
    check("int4", rows, 40, 512, group=group, zero_points=zero_points, gated=True, residual=True)


ONE_ROW = [
    Plan(row_tiles, warps, True, ahead, blocks, closer)
    for row_tiles, ahead in ((1, 5), (1, 8), (1, 10), (2, 4), (2, 5), (4, 2), (4, 4))
    for warps in (1, 8)
    for blocks, closer in ((3, 2048), (999, 0))
]
TILES = [
    Plan(r, w, staged, closer=512 if staged else 0)
    for r, w in ((1, 1), (1, 12), (2, 5), (2, 8), (4, 4))
    for staged in (True, False)
]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ONE_ROW, ids=str)
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_every_plan_of_one_row(form: str, plan: Plan) -> None:
    check(form, 1, 8209, 1088, norm=True, residual=True, plan=plan)
    check(form, 1, 4099, 4160, gated=True, plan=plan)
    if form == "bfloat16":
        check(form, 1, 4099, 1032, norm=True, plan=plan)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", TILES, ids=str)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("form", TILED)
def test_every_plan_of_tiles(form: str, rows: int, plan: Plan) -> None:
    if (form, plan.staged) not in TILES_OF:
        return
    if plan.row_tiles > 1:
        check(form, rows, 70, 1152, gated=True, norm=True, plan=plan)
    check(form, rows, 70, 1152, residual=True, plan=plan)


@pytest.mark.gpu
@pytest.mark.parametrize("form", list(UNIT))
def test_a_chain_with_and_without_dependent_launch(form: str) -> None:
    """Each product reads what the one before wrote, in a graph; without early launches the bits are the same."""
    device = torch.device("cuda")
    tensors, _ = weights(form, 1024, 1024, 128, zero_points=False, seed=1)
    gain = (torch.ones(1024, dtype=BF16, device=device), 1e-6)
    node = NODES[form]()
    packed = node.pack({name: t.to(device) for name, t in tensors.items()}, act=None)

    def chain(x: Tensor) -> Tensor:
        for _ in range(40):
            x = node.apply(x, packed, norm=gain)
        return x

    for rows in (1, 8):
        x = randn(rows, rows, 1024).to(device)
        check_early_launches(chain, x)


@pytest.mark.gpu
def test_int8_sums_are_exact() -> None:
    """Whole numbers whose products and sums float32 holds: every bit must be right."""
    device = torch.device("cuda")
    for rows, k in ((1, 1024), (8, 1024)):
        codes = randint(1, -127, 128, 64, k).to(torch.int8).to(device)
        x = randint(2, -127, 128, rows, k).to(BF16).to(device)
        x[:, 0] = 127  # so that a row's scale is 1
        node = CudaW8A8()
        packed = node.pack({"weight": codes, "weight_scale": torch.ones(64, device=device)}, act=None)
        out = node.apply(x, packed, out_dtype=F32)
        assert torch.equal(out, (x.double() @ codes.double().T).float())


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("rows", [16, 17, 40])
@pytest.mark.parametrize("group", [32, 128, 256])
def test_packing_keeps_every_code(halves: int, rows: int, group: int) -> None:
    """Read back by the definition: lane (g, t), word j of unit u holds columns 128 u + 32 j + 8 t + (0..7)."""
    k = 512
    tensors, wide = weights("int4", halves * rows, k, group, zero_points=True, seed=rows)
    words = to_tiles(tensors["weight"], halves).view(-1, k // 128, 2, 8, 4, 4)
    offsets = -136 - tensors["zero_point"].to(BF16)
    constants = to_constants(tensors["scale"], offsets, halves).view(-1, k // group, 16)
    tiles = -(-rows // 16)
    assert words.shape[0] == constants.shape[0] == halves * tiles
    scale, offset = constants.view(BF16).view(*constants.shape, 2).double().unbind(-1)
    for row in range(halves * rows):
        place = row % rows
        tile, half, g = row // rows * tiles + place // 16, place // 8 % 2, place % 8
        for column in range(0, k, 37):
            unit, j, t, i = column // 128, column // 32 % 4, column // 8 % 4, column % 8
            code = int(words[tile, unit, half, g, t, j]) >> (4 * i) & 15
            where = (tile, column // group, 8 * half + g)
            assert (128 + code + offset[where]) * scale[where] == wide[row, column]


def test_a_refusal_says_what_was_asked() -> None:
    class Library:
        def __getattr__(self, name: str) -> object:
            return type("Function", (), {"__call__": lambda *_: 1})()

    kernels = FewRows(Library(), FORMATS[2])  # type: ignore[arg-type]
    with pytest.raises(
        RuntimeError, match="product, int4 weights, M=2, N=16, K=128: no kernel takes the shape"
    ):
        kernels._expect_success("product", 2, 16, 128, 1)
    with pytest.raises(RuntimeError, match="CUDA error 222; the driver is older"):
        kernels._expect_success("product", 2, 16, 128, 1222)
    assert Operand(torch.empty(0), 16, False).groups == 0
