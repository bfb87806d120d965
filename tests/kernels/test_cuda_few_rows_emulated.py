"""The linear nodes of few rows in CUDA C++ without a GPU: their own sources, compiled by g++, against float64.

`emulated_cuda.h` and `emulated_stream.h` stand for the hardware. On a GPU `test_cuda_few_rows.py` runs the same
products, and larger ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from few_rows_support import BF16, EPS, F32, NODES, TILES_OF, check, own_product, randint, weights
from torch import Tensor
from triton_support import randn, rel_error

from pymllm_core.nn import quant_ops
from pymllm_kernels.cuda import few_rows
from pymllm_kernels.cuda.few_rows import CudaW4A16, CudaW8A8
from pymllm_kernels.cuda.few_rows_library import (
    FORMATS,
    UNIT,
    Format,
    Plan,
)
from pymllm_kernels.cutlass.w8a8 import CutlassW8A8
from pymllm_kernels.triton.w8a8 import TritonW8A8

if TYPE_CHECKING:
    from few_rows_emulation import Emulation

CPU = torch.device("cpu")
NAN = float("nan")

pytest_plugins = ("few_rows_emulation",)
pytestmark = pytest.mark.usefixtures("emulated_nodes")


@pytest.mark.parametrize(("form", "staged"), TILES_OF)
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_up_to_eight_rows(form: str, rows: int, staged: bool) -> None:
    """Norm, bias and residual; units that warps take in several rounds; a last tile that is not full."""
    k = 9 * UNIT[form]
    check(form, rows, 19, k, seed=rows, norm=True, residual=True, plan=Plan(1, 2, staged), device=CPU)
    check(
        form,
        rows,
        19,
        k,
        seed=rows,
        gated=True,
        bias=True,
        out_dtype=F32,
        plan=Plan(2, 3, staged),
        device=CPU,
    )


@pytest.mark.parametrize("rows", [9, 16, 17, 31, 32])
def test_more_rows_of_int4(rows: int) -> None:
    plan = Plan(2, 2, staged=False)
    check("int4", rows, 17, 640, seed=rows, norm=True, gated=True, plan=plan, device=CPU)
    check("int4", rows, 33, 640, seed=rows, residual=True, out_dtype=F32, plan=plan, device=CPU)


TILES = [
    Plan(r, w, staged, closer=700 * r if staged else 0)
    for r, w in ((1, 1), (1, 12), (2, 8), (4, 4))
    for staged in (True, False)
]


@pytest.mark.parametrize("plan", TILES, ids=str)
@pytest.mark.parametrize("form", FORMATS[1:], ids=lambda form: form.name)
def test_every_size_of_tiles(form: Format, plan: Plan) -> None:
    """One tile of rows of x and, of int4 from global memory, two and four."""
    if (form.weights, plan.staged) not in TILES_OF:
        return
    for rows in (3,) if plan.staged or form.weights == "int8" else (3, 12, 27):
        if (form.weights, plan.row_tiles) == ("int4", 4) and rows > 16:
            continue  # not compiled
        if plan.warps > 8 and rows > 8:
            continue
        one = functools.partial(
            check, form.weights, rows, norm=True, group=128 // form.parts, plan=plan, device=CPU
        )
        if plan.row_tiles > 1:
            one(35, 640, gated=True, zero_points=True)
        one(70, 640, residual=True)


ONE_ROW = [
    Plan(row_tiles, warps, True, ahead, blocks, closer)
    for row_tiles, ahead in ((1, 5), (1, 8), (1, 10), (2, 2), (2, 4), (2, 5), (2, 8), (4, 2), (4, 4))
    for warps, blocks, closer in ((1, 3, 5000), (8, 999, 0))
]


@pytest.mark.parametrize("plan", ONE_ROW, ids=str)
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_one_row(form: str, plan: Plan) -> None:
    """Rows that are no multiple of 512 bytes, results that the last warp has no more of, blocks in turn."""
    check(form, 1, 51, 1088, norm=True, residual=True, plan=plan, device=CPU)
    check(form, 1, 21, 2112, gated=True, bias=True, out_dtype=F32, plan=plan, device=CPU)
    few = check(form, 1, 45, 64, plan=plan, device=CPU)
    other = Plan(plan.row_tiles, plan.warps, True, plan.ahead, 1)
    assert torch.equal(few, check(form, 1, 45, 64, plan=other, device=CPU))


@pytest.mark.parametrize("k", [8, 24, 1000, 2056])
@pytest.mark.parametrize("plan", ONE_ROW[::3], ids=str)
def test_one_row_of_any_eight_columns(k: int, plan: Plan) -> None:
    """bfloat16 takes 16 bytes at a time, however few are left."""
    check("bfloat16", 1, 37, k, norm=True, residual=True, plan=plan, device=CPU)
    check("bfloat16", 1, 13, k, gated=True, out_dtype=F32, plan=plan, device=CPU)


@pytest.mark.parametrize("rows", [1, 6, 20])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("zero_points", [False, True])
def test_groups(rows: int, group: int, zero_points: bool) -> None:
    check("int4", rows, 72, 1024, group=group, zero_points=zero_points, norm=True, device=CPU)
    check("int4", rows, 40, 512, group=group, zero_points=zero_points, gated=True, residual=True, device=CPU)


@pytest.mark.parametrize(
    ("form", "rows"),
    [*(("int8", r) for r in (1, 2, 8)), *(("int4", r) for r in (1, 8, 9, 33, 64))],
)
def test_what_the_nodes_choose(form: str, rows: int) -> None:
    check(form, rows, 40, 256, norm=True, bias=True, seed=rows, device=CPU)
    check(form, rows, 24, 384, gated=True, residual=True, out_dtype=F32, seed=rows, device=CPU)


def test_rows_that_are_not_aligned_are_copied() -> None:
    """The same bits from x at odd places and from x at multiples of 16 bytes."""
    tensors, _ = weights("int4", 16, 256, 128, zero_points=False, seed=1)
    node = CudaW4A16()
    packed = node.pack(tensors, act=None)
    wide = randn(1, 3, 300).cpu()
    assert torch.equal(node.apply(wide[:, 1:257], packed), node.apply(wide[:, 1:257].clone(), packed))
    assert node.apply(wide[:0, :256], packed).shape == (0, 16)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_widening_is_exact(gated: bool, group: int) -> None:
    """One rounding of code times scale; rows from anywhere, over the border between gate and up."""
    n, k = 43, 512
    tensors, wide = weights("int4", 2 * n if gated else n, k, group, zero_points=True, seed=group)
    node = CudaW4A16()
    packed = node.pack(tensors, act="silu_mul" if gated else None)
    for first, rows in [(0, len(wide)), (5, 11), (30, 13), (40, 20)][: 4 if gated else 3]:
        out = torch.full((rows, k), NAN, dtype=BF16)
        packed.kernels.widen(packed.own, first, out)
        assert torch.equal(out, wide[first : first + rows].to(BF16))


def test_one_node_serves_groups_of_several_sizes() -> None:
    """One node is made for all linears that chose it; each weight keeps the kernels of its own groups."""
    node, k = CudaW4A16(), 256
    packed = []
    for group in (64, 32, 128, 256):
        tensors, wide = weights("int4", 24, k, group, zero_points=True, seed=group)
        packed.append((node.pack(tensors, act=None), wide))
    x = randn(1, 3, k).cpu()
    for weight, wide in packed:
        out = node.apply(x, weight, out_dtype=F32)
        assert rel_error(out, x.double() @ wide.T) < 1e-4
        widened = torch.full((24, k), NAN, dtype=BF16)
        weight.kernels.widen(weight.own, 0, widened)
        assert torch.equal(widened, wide.to(BF16))


def test_each_int8_weight_has_the_kernel_for_many_rows_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUTLASS multiplies by multiples of 16 rows; one weight that it does not take decides for no other."""
    monkeypatch.setattr(few_rows, "why_not_here", lambda capability, dtype: None)
    monkeypatch.setattr(CutlassW8A8, "pack", TritonW8A8.pack)  # which would compile
    node = CudaW8A8()
    found = []
    for n in (20, 32, 24, 16):
        tensors, _ = weights("int8", n, 64, 64, zero_points=False, seed=n)
        found.append(type(node.pack(tensors, act=None).many))
    assert found == [TritonW8A8, CutlassW8A8, TritonW8A8, CutlassW8A8]


def test_int8_sums_are_exact() -> None:
    """Whole numbers whose products and sums float32 holds: every bit must be right."""
    codes = randint(1, -127, 128, 20, 1024).to(torch.int8)
    x = randint(2, -127, 128, 8, 1024).to(BF16)
    x[:, 0] = 127  # so that a row's scale is 1
    node = CudaW8A8()
    packed = node.pack({"weight": codes, "weight_scale": torch.ones(20)}, act=None)
    for rows in (1, 8):
        out = node.apply(x[:rows], packed, out_dtype=F32)
        assert torch.equal(out, (x[:rows].double() @ codes.double().T).float())


def test_codes_are_those_of_the_definition() -> None:
    """Quantised as `quant_ops` does it, ties and rows of zeros as well: the product with a unit matrix shows them."""
    x = randn(3, 8, 64).cpu()
    x[0] = torch.arange(64) - 31.5  # half of the codes are ties
    x[1] = 0
    node = CudaW8A8()
    packed = node.pack({"weight": torch.eye(64).to(torch.int8), "weight_scale": torch.ones(64)}, act=None)
    codes, scale = quant_ops.quantize_per_token_int8(x)
    wanted = codes.float() * scale
    several = own_product(node, x, packed, Plan(1, 1, False), norm=None, residual=None, out_dtype=F32)
    assert torch.equal(several, wanted)
    for row in range(len(x)):
        one = own_product(
            node, x[row : row + 1], packed, Plan(1, 1, True, 5), norm=None, residual=None, out_dtype=F32
        )
        assert torch.equal(one, wanted[row : row + 1])


EARLY = [
    (form, rows, plan)
    for form in FORMATS
    for rows, plan in (
        (1, Plan(1, 2, True)), (3, Plan(2, 2, False)), (12, Plan(1, 1, False)), (1, Plan(2, 2, True, 4, 2)),
        (1, Plan(1, 1, True, closer=1 << 16)), (1, Plan(2, 2, True, 2, 2, 1 << 16)),
    )
    if (form.weights != "int4" if plan.ahead else (form.weights, plan.staged) in TILES_OF)
    and (rows <= 8 or form.weights == "int4")
]  # fmt: skip


@pytest.mark.parametrize(("form", "rows", "plan"), EARLY, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_nothing_is_read_before_it_is_there(
    emulation: Emulation, form: Format, rows: int, plan: Plan, norm: bool
) -> None:
    """x and the residual are written when the kernel waits for the one before it, not earlier."""
    n, k = 19, 384
    tensors, _ = weights(form.weights, n, k, 128 // form.parts, zero_points=False, seed=rows)
    node = NODES[form.weights]()
    packed = node.pack(tensors, act=None)
    gain = (randn(1, k).cpu(), EPS) if norm else None
    real = {"x": randn(2, rows, k).cpu(), "residual": randn(3, rows, n).cpu()}
    wanted = own_product(node, real["x"], packed, plan, norm=gain, residual=real["residual"], out_dtype=F32)
    late = {name: torch.full_like(tensor, NAN) for name, tensor in real.items()}
    library = emulation.library(form)
    prepared = not plan.staged and (norm or form.weights == "int8")
    library.emulated_clear()
    for name, launch in (("x", 0), ("residual", 1 if prepared else 0)):
        to, source = late[name], real[name]
        library.emulated_arrives(launch, to.data_ptr(), source.data_ptr(), source.numel() * 2)
    got = own_product(node, late["x"], packed, plan, norm=gain, residual=late["residual"], out_dtype=F32)
    library.emulated_clear()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(("form", "rows", "plan"), EARLY, ids=str)
def test_nothing_is_read_beside_the_tensors(
    emulation: Emulation, form: Format, rows: int, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows after the last of x and of the weight, columns after the last."""
    n, k, rows = 21, 384, 7 if rows == 3 else rows
    tensors, _ = weights(form.weights, 2 * n, k, 128 // form.parts, zero_points=False, seed=rows)
    node = NODES[form.weights]()
    packed = node.pack(tensors, act="silu_mul")
    own = packed.own
    assert own is not None
    gain = None if form.weights == "int8" and not plan.staged else (randn(1, k).cpu(), EPS)
    x = randn(2, rows, k).cpu()
    made: list[Tensor] = []  # by the launch that prepares x

    def remembered(*arguments: Any, **options: Any) -> Tensor:
        made.append(empty(*arguments, **options))
        library.emulated_allows(made[-1].data_ptr(), made[-1].numel() * made[-1].element_size())
        return made[-1]

    empty, library = torch.empty, emulation.library(form)
    monkeypatch.setattr(torch, "empty", remembered)
    for tensor in (x, own.weight, own.scale, None if gain is None else gain[0]):
        if tensor is not None:
            library.emulated_allows(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    plan = dataclasses.replace(plan, row_tiles=max(plan.row_tiles, 1 if plan.ahead else 2))
    own_product(node, x, packed, plan, norm=gain, residual=None, out_dtype=BF16)
    library.emulated_clear()
