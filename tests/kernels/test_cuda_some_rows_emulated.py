"""The linear node of some rows in CUDA C++ without a GPU: its own source, compiled by g++, against float64.

`emulated_cuda.h` and `emulated_stream.h` stand for the hardware. On a GPU `test_cuda_some_rows.py` runs larger
products.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from few_rows_support import BF16, EPS, F32, LAYERS
from some_rows_support import check
from triton_support import randn

from pymllm_kernels.cuda.few_rows_library import FewRowsError, Operand
from pymllm_kernels.cuda.some_rows_library import (
    MAX_STAGES,
    MAX_WARPS,
    Arguments,
    Plan,
    SomeRows,
    shared_bytes,
)
from pymllm_kernels.cuda.some_rows_plan import LARGEST, some_rows_plan

if TYPE_CHECKING:
    from few_rows_emulation import Emulation

NAN = float("nan")
pytest_plugins = ("few_rows_emulation",)


@pytest.fixture(scope="module")
def kernels(emulation: Emulation) -> SomeRows:
    return SomeRows(emulation.some_rows())


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16])
@pytest.mark.parametrize("block_k", [64, 128])
def test_every_kernel(kernels: SomeRows, rows: int, block_k: int) -> None:
    """Norm, bias, residual, both types of results; a last tile that is not full, and one without a row of W."""
    plan = Plan(2, block_k, 3, 1)
    k = 5 * block_k
    check(kernels, rows, 37, k, plan, seed=rows, gated=True, norm=True, residual=True)
    check(kernels, rows, 18, k, plan, seed=rows, gated=True, bias=True, out_dtype=F32)
    check(kernels, rows, 37, k, plan, seed=rows, residual=True, norm=True, out_dtype=F32)
    check(kernels, rows, 18, k, plan, seed=rows, bias=True)


@pytest.mark.parametrize("stages", range(2, MAX_STAGES + 1))
@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 8, 9, 17])
def test_every_ring(kernels: SomeRows, stages: int, chunks: int) -> None:
    """Fewer chunks than stages, as many, and several rounds."""
    check(kernels, 11, 20, 64 * chunks, Plan(2, 64, stages), seed=stages, norm=True)


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("norm", [False, True])
def test_clusters(kernels: SomeRows, splits: int, rows: int, norm: bool) -> None:
    """Columns in unequal runs, and more blocks than chunks; the bits are the same every time."""
    for k, plan in ((576, Plan(2, 64, 3, splits)), (384, Plan(1, 128, 2, splits))):
        check(kernels, rows, 35, k, plan, seed=rows, norm=norm, residual=True)
        check(kernels, rows, 35, k, plan, seed=rows, norm=norm, gated=True, bias=True, out_dtype=F32)


@pytest.mark.parametrize("warps", [1, 3, 5, 8, 12])
def test_every_number_of_warps(kernels: SomeRows, warps: int) -> None:
    check(kernels, 9, 16 * warps + 7, 256, Plan(warps, 64, 2, 2), norm=True, residual=True)
    check(kernels, 13, 100, 256, Plan(warps, 128, 2), norm=True, gated=True)


@pytest.mark.parametrize("plan", [Plan(2, 64, 4), Plan(1, 128, 3, 2), Plan(2, 64, 8)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_nothing_is_read_before_it_is_there(emulation: Emulation, plan: Plan, norm: bool) -> None:
    """x and the residual are written when the kernel waits for the one before it, not earlier."""
    rows, n, k = 11, 19, 640
    library = emulation.some_rows()
    kernels = SomeRows(library)
    own = Operand(randn(1, n, k, scale=k**-0.5).cpu(), n, gated=False)
    gain = (randn(1, k).cpu(), EPS) if norm else None
    x, residual = randn(2, rows, k).cpu(), randn(3, rows, n).cpu()
    wanted = kernels(x, own, plan, norm=gain, residual=residual, dtype=F32)
    late_x, late_residual = torch.full_like(x, NAN), torch.full_like(residual, NAN)
    library.emulated_clear()
    for late, real in ((late_x, x), (late_residual, residual)):
        library.emulated_arrives(0, late.data_ptr(), real.data_ptr(), real.numel() * 2)
    got = kernels(late_x, own, plan, norm=gain, residual=late_residual, dtype=F32)
    library.emulated_clear()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("plan", [Plan(2, 64, 4), Plan(1, 128, 3, 2), Plan(2, 64, 8)], ids=str)
@pytest.mark.parametrize("rows", [7, 12])
def test_nothing_is_read_beside_the_tensors(emulation: Emulation, plan: Plan, rows: int) -> None:
    """Rows after the last of x and of the weight, columns after the last."""
    n, k = 21, 384
    library = emulation.some_rows()
    x, weight, gain = randn(2, rows, k).cpu(), randn(1, 2 * n, k).cpu(), randn(3, k).cpu()
    for tensor in (x, weight, gain):
        library.emulated_allows(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    SomeRows(library)(x, Operand(weight, n, gated=True), plan, norm=(gain, EPS), residual=None, dtype=BF16)
    library.emulated_clear()


@pytest.mark.parametrize(
    "plan",
    [
        Plan(0),
        Plan(MAX_WARPS + 1),
        Plan(1, 32),
        Plan(1, 128),
        Plan(1, 64, 1),
        Plan(1, 64, MAX_STAGES + 1),
        Plan(1, 64, 2, 3),
        Plan(1, 64, 2, 16),
    ],
    ids=str,
)
def test_what_no_kernel_takes(kernels: SomeRows, plan: Plan) -> None:
    own = Operand(randn(1, 16, 192).cpu(), 16, gated=False)
    x = randn(2, 3, 192).cpu()
    with pytest.raises(FewRowsError, match=r"M=3, N=16, K=192, Plan\(.*: no kernel takes the shape"):
        kernels(x, own, plan, norm=None, residual=None, dtype=BF16)


def test_more_rows_than_any_kernel_takes(kernels: SomeRows) -> None:
    own = Operand(randn(1, 16, 64).cpu(), 16, gated=False)
    with pytest.raises(FewRowsError, match="M=17"):
        kernels(randn(2, 17, 64).cpu(), own, Plan(1), norm=None, residual=None, dtype=BF16)


def test_shared_memory_is_as_python_says(emulation: Emulation) -> None:
    library = emulation.some_rows()
    for rows, gated, warps, block_k, stages, splits, norm in itertools.product(
        (1, 8, 9, 16), (False, True), (1, 5), (64, 128), (2, 8), (1, 4), (False, True)
    ):
        plan = Plan(warps, block_k, stages, splits)
        arguments = Arguments(block_k=block_k, stages=stages, splits=splits)
        product = arguments.product
        product.m, product.gated, product.warps, product.norm = rows, gated, warps, int(norm)
        found = library.pymllm_some_rows_shared_memory(ctypes.byref(arguments))
        assert found == shared_bytes(rows, plan, gated=gated, norm=norm)


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize(
    ("sms", "shared", "clusters"),
    [(132, 227 << 10, True), (114, 227 << 10, True), (108, 163 << 10, False), (16, 99 << 10, False)],
)
def test_the_rules_fit_every_device(model: str, sms: int, shared: int, clusters: bool) -> None:
    """Plans that are compiled, and that the device has shared memory for."""
    for rows, (i, (n, k)) in itertools.product((1, 2, 8, 16), enumerate(LAYERS[model])):
        norm, gated = i in (0, 2), i == 2
        plan = some_rows_plan(rows, n, k, sms, gated=gated, normed=norm, shared=shared, clusters=clusters)
        assert k % plan.block_k == 0
        assert 2 <= plan.stages <= MAX_STAGES
        assert 1 <= plan.warps <= MAX_WARPS
        assert plan.splits <= (8 if clusters else 1)
        assert shared_bytes(rows, plan, gated=gated, norm=norm) <= min(shared, LARGEST)


def test_the_rules_run(kernels: SomeRows) -> None:
    for gated, rows in itertools.product((False, True), (2, 13)):
        plan = some_rows_plan(rows, 72, 320, 4, gated=gated, normed=True)
        check(kernels, rows, 72, 320, plan, gated=gated, norm=True)
