"""The linear node of many rows in CUDA C++ on a GPU, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from few_rows_support import F32, LAYERS, check_early_launches
from many_rows_support import check
from torch import Tensor
from triton_support import randn

from pymllm_kernels.cuda.few_rows import CudaLinear
from pymllm_kernels.cuda.many_rows_library import (
    CAPABILITY,
    X_ROWS,
    ManyRows,
    Plan,
    many_rows_kernels,
    shared_bytes,
)
from pymllm_kernels.cuda.many_rows_plan import many_rows_plan
from pymllm_kernels.triton import launch

DEVICE = torch.device("cuda")


@pytest.fixture
def kernels() -> ManyRows:
    capability = torch.cuda.get_device_capability()
    if capability != CAPABILITY:
        pytest.skip(f"needs compute capability 9.0, this device has {capability}")
    return many_rows_kernels(capability)


@pytest.mark.gpu
@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("rows", [1, 2, 8, 13, 32, 57, 64, 100, 128, 200, 256])
def test_a_layer_by_the_rules(kernels: ManyRows, model: str, rows: int) -> None:
    properties = launch.gpu(DEVICE)
    for i, (n, k) in enumerate(LAYERS[model]):
        plan = many_rows_plan(rows, n, k, properties.sms, gated=i == 2, shared=properties.shared)
        if plan is not None:
            check(kernels, rows, n, k, plan, seed=i, gated=i == 2, residual=i % 2 == 1, device=DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("x_rows", X_ROWS)
def test_every_plan(kernels: ManyRows, splits: int, x_rows: int) -> None:
    """Odd sizes; a result has the same bits every time."""
    for groups, stages in itertools.product((1, 2), (2, 5)):
        plan = Plan(x_rows, groups, stages, splits)
        if shared_bytes(plan) > launch.gpu(DEVICE).shared:
            continue
        rows = x_rows + 3
        results = [check(kernels, rows, 1002, 1160, plan, residual=True, device=DEVICE) for _ in "ab"]
        assert torch.equal(*results)
        check(kernels, rows, 1002, 1160, plan, gated=True, bias=True, out_dtype=F32, device=DEVICE)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_a_chain_of_early_launches() -> None:
    """Each product reads what the one before it writes: none may come too early."""
    weights = [randn(i, 1024, 1024, scale=1024**-0.5).to(DEVICE) for i in range(4)]
    node = CudaLinear()
    packed = [node.pack({"weight": weight}, act=None) for weight in weights]

    def chain(x: Tensor) -> Tensor:
        y = x
        for i in range(48):
            y = node.apply(y, packed[i % 4], residual=x)
            if i % 12 == 11:
                y = y / y.float().abs().amax().to(y.dtype)
        return y

    for rows in (5, 32, 64, 200):
        check_early_launches(chain, randn(9, rows, 1024).to(DEVICE))
