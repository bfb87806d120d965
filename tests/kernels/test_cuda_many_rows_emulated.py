"""The linear node of many rows in CUDA C++ without a GPU: its own source, compiled by g++, against float64.

`emulated_hopper.h` stands for the hardware: copies by the device, barriers that count bytes, products from shared
memory. On a GPU `test_cuda_many_rows.py` runs larger products.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from few_rows_support import BF16, F32, LAYERS
from many_rows_support import check
from triton_support import randn

from pymllm_kernels.cuda.few_rows_library import FewRowsError, Operand
from pymllm_kernels.cuda.many_rows_library import (
    CHUNK,
    MAX_STAGES,
    X_ROWS,
    Arguments,
    ManyRows,
    Plan,
    shared_bytes,
)
from pymllm_kernels.cuda.many_rows_plan import MAX_ROWS, many_rows_plan

if TYPE_CHECKING:
    from few_rows_emulation import Emulation

NAN = float("nan")
SHARED = 227 << 10
pytest_plugins = ("few_rows_emulation",)


@pytest.fixture(scope="module")
def kernels(emulation: Emulation) -> ManyRows:
    return ManyRows(emulation.many_rows())


@pytest.mark.parametrize("x_rows", X_ROWS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_kernel(kernels: ManyRows, x_rows: int, groups: int) -> None:
    """Bias, residual, both types of results; last tiles of x, of W and of columns that are not full."""
    plan = Plan(x_rows, groups, 2)
    check(kernels, x_rows - 3, 74, 328, plan, seed=x_rows, gated=True, residual=True)
    check(kernels, x_rows + 5, 74, 256, plan, seed=x_rows, gated=True, bias=True, out_dtype=F32)
    check(kernels, x_rows + 5, 146, 264, plan, seed=x_rows, residual=True, bias=True)
    check(kernels, x_rows, 18, 64, plan, seed=x_rows, residual=True, out_dtype=F32)


@pytest.mark.parametrize("stages", [2, 3, 7, MAX_STAGES])
@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 8, 13])
def test_every_ring(kernels: ManyRows, stages: int, chunks: int) -> None:
    """Fewer chunks than stages, as many, and several rounds."""
    check(kernels, 11, 20, 128 * chunks, Plan(8, 1, stages), seed=stages)


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("x_rows", [8, 32, 64])
def test_clusters(kernels: ManyRows, splits: int, x_rows: int) -> None:
    """Columns in unequal runs, and more blocks than chunks; the bits are the same every time."""
    for k, groups, stages in ((1160, 1, 3), (384, 2, 2)):
        plan = Plan(x_rows, groups, stages, splits)
        if shared_bytes(plan) > SHARED:
            continue
        first, again = (
            check(kernels, x_rows + 1, 70, k, plan, seed=k, residual=True, out_dtype=F32) for _ in "ab"
        )
        assert torch.equal(first, again)
        check(kernels, x_rows - 1, 70, k, plan, seed=k, gated=True, bias=True)


@pytest.mark.parametrize("plan", [Plan(8, 1, 4), Plan(32, 2, 3, 2), Plan(16, 1, 8, 4)], ids=str)
def test_nothing_is_read_before_it_is_there(emulation: Emulation, plan: Plan) -> None:
    """x and the residual are written when the kernel waits for the one before it, not earlier."""
    rows, n, k = 11, 36, 640
    library = emulation.many_rows()
    kernels = ManyRows(library)
    own = Operand(randn(1, n, k, scale=k**-0.5).cpu(), n, gated=False)
    x, residual = randn(2, rows, k).cpu(), randn(3, rows, n).cpu()
    wanted = kernels(x, own, plan, residual=residual, dtype=F32)
    late_x, late_residual = torch.full_like(x, NAN), torch.full_like(residual, NAN)
    library.emulated_clear()
    for late, real in ((late_x, x), (late_residual, residual)):
        library.emulated_arrives(0, late.data_ptr(), real.data_ptr(), real.numel() * 2)
    got = kernels(late_x, own, plan, residual=late_residual, dtype=F32)
    library.emulated_clear()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("plan", [Plan(8, 1, 4), Plan(32, 2, 3, 2)], ids=str)
def test_nothing_is_read_beside_the_tensors(emulation: Emulation, plan: Plan) -> None:
    """Rows after the last of x and of the weight, columns after the last."""
    n, k, rows = 22, 328, 7
    library = emulation.many_rows()
    x, weight = randn(2, rows, k).cpu(), randn(1, 2 * n, k).cpu()
    for tensor in (x, weight):
        library.emulated_allows(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    ManyRows(library)(x, Operand(weight, n, gated=True), plan, residual=None, dtype=BF16)
    library.emulated_clear()


@pytest.mark.parametrize(
    "plan",
    [
        Plan(24, 1, 2),
        Plan(8, 0, 2),
        Plan(8, 3, 2),
        Plan(8, 1, 1),
        Plan(8, 1, MAX_STAGES + 1),
        Plan(8, 1, 2, 3),
        Plan(8, 1, 2, 16),
    ],
    ids=str,
)
def test_what_no_kernel_takes(kernels: ManyRows, plan: Plan) -> None:
    own = Operand(randn(1, 16, 192).cpu(), 16, gated=False)
    with pytest.raises(FewRowsError, match=r"M=3, N=16, K=192, Plan\(.*: no kernel takes the shape"):
        kernels(randn(2, 3, 192).cpu(), own, plan, residual=None, dtype=BF16)


@pytest.mark.parametrize(("n", "k"), [(15, 64), (16, 60)])
def test_shapes_that_no_kernel_takes(kernels: ManyRows, n: int, k: int) -> None:
    """Odd numbers of results, and columns that do not fill 16 bytes: nor does a rule choose it for them."""
    own = Operand(randn(1, n, k).cpu(), n, gated=False)
    with pytest.raises(FewRowsError, match="no kernel takes the shape"):
        kernels(randn(2, 9, k).cpu(), own, Plan(16, 1, 2), residual=None, dtype=BF16)
    assert many_rows_plan(9, n, k, 132, gated=False) is None


def test_shared_memory_is_as_python_says(emulation: Emulation) -> None:
    library = emulation.many_rows()
    for x_rows, groups, stages, splits in itertools.product(X_ROWS, (1, 2), (2, 5), (1, 4)):
        arguments = Arguments(x_rows=x_rows, groups=groups, stages=stages, splits=splits)
        found = library.pymllm_many_rows_shared_memory(ctypes.byref(arguments))
        assert found == shared_bytes(Plan(x_rows, groups, stages, splits))


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("sms", [132, 114])
def test_the_rules_fit_every_device(model: str, sms: int) -> None:
    """Plans that are compiled, and that the device has shared memory for."""
    some = 0
    for rows, (i, (n, k)) in itertools.product(
        (2, 8, 16, 24, 32, 64, 96, 128, 256), enumerate(LAYERS[model])
    ):
        plan = many_rows_plan(rows, n, k, sms, gated=i == 2)
        if plan is None:
            continue
        some += 1
        assert plan.x_rows in X_ROWS
        assert 2 <= plan.stages <= MAX_STAGES
        assert shared_bytes(plan) <= SHARED
    assert some > 20
    assert many_rows_plan(MAX_ROWS + 1, *LAYERS[model][0], sms, gated=False) is None
    assert many_rows_plan(32, 151936, LAYERS[model][0][1], sms, gated=False) is None


@pytest.mark.parametrize("k", [8, 64, 200, 256, 1000, 1024])
def test_blocks_that_share_columns_have_some(k: int) -> None:
    plan = many_rows_plan(16, 64, k, 132, gated=False)
    assert plan is not None
    assert plan.splits == 1 or plan.splits * CHUNK <= k
    assert plan.splits == min(8, max(1, 1 << (k // CHUNK).bit_length() >> 1))


def test_the_rules_run(kernels: ManyRows) -> None:
    for gated, rows in itertools.product((False, True), (2, 13, 40, 100, 200)):
        plan = many_rows_plan(rows, 72, 320, 4, gated=gated)
        if plan is not None:
            check(kernels, rows, 72, 320, plan, gated=gated)
