"""The linear node of some rows in CUDA C++ on a GPU, against float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from few_rows_support import BF16, F32, LAYERS, check_early_launches
from some_rows_support import check
from torch import Tensor
from triton_support import randn

from pymllm_kernels.cuda.few_rows_library import Operand
from pymllm_kernels.cuda.some_rows_library import Plan, SomeRows, shared_bytes, some_rows_kernels
from pymllm_kernels.cuda.some_rows_plan import some_rows_plan
from pymllm_kernels.triton import launch

DEVICE = torch.device("cuda")


def gpu_kernels() -> SomeRows:
    return some_rows_kernels(torch.cuda.get_device_capability())


def most_splits() -> int:
    return 8 if torch.cuda.get_device_capability() >= (9, 0) else 1


@pytest.mark.gpu
@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("rows", [1, 2, 8, 13, 16])
def test_a_layer_by_the_rules(model: str, rows: int) -> None:
    properties = launch.gpu(DEVICE)
    for i, (n, k) in enumerate(LAYERS[model]):
        norm, gated = i in (0, 2), i == 2
        plan = some_rows_plan(
            rows,
            n,
            k,
            properties.sms,
            gated=gated,
            normed=norm,
            shared=properties.shared,
            clusters=most_splits() > 1,
        )
        check(
            gpu_kernels(), rows, n, k, plan, seed=i, norm=norm, gated=gated, residual=not norm, device=DEVICE
        )


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("block_k", [64, 128])
def test_every_plan(splits: int, block_k: int) -> None:
    """Odd sizes; a result has the same bits every time."""
    if splits > most_splits():
        pytest.skip("clusters need compute capability 9.0")
    for rows, warps, stages in itertools.product((5, 12), (1, 4, 8), (2, 5)):
        plain, gated = Plan(warps, block_k, stages, splits), Plan(warps, 64, 3, splits)
        if shared_bytes(rows, plain, gated=False, norm=True) > launch.gpu(DEVICE).shared:
            continue
        assert shared_bytes(rows, gated, gated=True, norm=True) <= launch.gpu(DEVICE).shared
        results = [
            check(gpu_kernels(), rows, 1003, 1152, plain, norm=True, residual=True, device=DEVICE)
            for _ in "ab"
        ]
        assert torch.equal(*results)
        check(gpu_kernels(), rows, 1003, 1152, gated, gated=True, norm=True, bias=True, device=DEVICE)
        check(gpu_kernels(), rows, 514, 1152, gated, out_dtype=F32, device=DEVICE)


@pytest.mark.gpu
def test_a_chain_with_and_without_dependent_launch() -> None:
    """Each product reads what the one before wrote, in a graph; without early launches the bits are the same."""
    weight = randn(1, 1024, 1024, scale=1 / 32).to(DEVICE)
    own, gain = Operand(weight, 1024, gated=False), (torch.ones(1024, dtype=BF16, device=DEVICE), 1e-6)
    kernels = gpu_kernels()

    def chain(x: Tensor, plan: Plan) -> Tensor:
        for _ in range(40):
            x = kernels(x, own, plan, norm=gain, residual=None, dtype=BF16)
        return x

    for rows, splits in ((8, 1), (8, most_splits()), (14, min(2, most_splits()))):
        plan = Plan(4, 64, 6, splits)
        x = randn(rows, rows, 1024).to(DEVICE)
        check_early_launches(functools.partial(chain, plan=plan), x)
