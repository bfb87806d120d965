"""Who computes a `CudaLinear` without a GPU: its kernels of one, some and many rows, emulated, or the rest.

`few_rows_emulation.py` stands for the hardware. On a GPU `test_cuda_few_rows.py` runs the same node.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from few_rows_support import BF16, F32, check, weights
from triton_support import randn

from pymllm_kernels.cuda import few_rows
from pymllm_kernels.cuda.few_rows import MAX_NORMED, CudaLinear
from pymllm_kernels.cuda.few_rows_library import FewRows
from pymllm_kernels.cuda.many_rows_library import ManyRows
from pymllm_kernels.cuda.some_rows_library import Plan, SomeRows
from pymllm_kernels.cuda.some_rows_plan import some_rows_plan
from pymllm_kernels.triton.launch import Gpu, pretend
from pymllm_kernels.triton.linear import TritonLinear

CPU = torch.device("cpu")

pytest_plugins = ("few_rows_emulation",)
pytestmark = pytest.mark.usefixtures("emulated_nodes")


@pytest.fixture
def computed_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who has computed, product by product."""
    found: list[str] = []

    def watch(kind: Any, method: str, name: str) -> None:
        real = getattr(kind, method)

        def watched(*arguments: Any, **options: Any) -> Any:
            found.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(kind, method, watched)

    watch(FewRows, "__call__", "one row")
    watch(SomeRows, "__call__", "some rows")
    watch(ManyRows, "__call__", "many rows")
    watch(TritonLinear, "apply", "the rest")
    return found


@pytest.mark.parametrize("rows", [2, 3, 7, 8, 9, 15, 16])
@pytest.mark.parametrize("n", [1, 24, 37])
def test_two_to_sixteen_rows(computed_by: list[str], rows: int, n: int) -> None:
    """Rows of x and of the residual lie apart; numbers of results that are odd, of which many rows are not made."""
    check("bfloat16", rows, n, 256, seed=rows, norm=True, residual=True, device=CPU)
    check("bfloat16", rows, n, 320, seed=rows, norm=True, bias=True, gated=True, device=CPU)
    check("bfloat16", rows, n, 64, seed=rows, bias=True, residual=True, out_dtype=F32, device=CPU)
    check("bfloat16", rows, n, 192, seed=rows, gated=True, residual=True, out_dtype=F32, device=CPU)
    assert computed_by == ["some rows" if n % 2 else "many rows"] * 4


@pytest.mark.parametrize("rows", [2, 13, 16])
def test_some_rows_without_the_kernels_of_many(
    computed_by: list[str], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices than Hopper have none."""
    monkeypatch.setattr(few_rows, "many_kernels_for", lambda weight: None)
    check("bfloat16", rows, 24, 256, seed=rows, norm=True, residual=True, device=CPU)
    assert computed_by == ["some rows"]


@pytest.mark.parametrize("rows", [2, 13])
@pytest.mark.parametrize("major", [8, 9])
def test_blocks_of_a_cluster(monkeypatch: pytest.MonkeyPatch, rows: int, major: int) -> None:
    """Where the device has clusters, they share the columns."""
    plans: list[Plan] = []

    def remembered(*arguments: Any, **options: Any) -> Plan:
        plans.append(some_rows_plan(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(few_rows, "some_rows_plan", remembered)
    with pretend(Gpu(132, major, 227 << 10, pdl=False)):
        check("bfloat16", rows, 71, 1024, norm=True, residual=True, device=CPU)
        check("bfloat16", rows, 71, 512, norm=True, gated=True, out_dtype=F32, device=CPU)
    assert [plan.splits > 1 for plan in plans] == [major >= 9] * 2


@pytest.mark.parametrize(("rows", "k"), [(2, 32), (8, 200), (16, 1056), (17, 256), (40, 64), (150, 136)])
def test_many_rows(computed_by: list[str], rows: int, k: int) -> None:
    """Columns that fill 16 bytes are enough. Rows of the residual at odd places are copied."""
    check("bfloat16", rows, 40, k, norm=True, residual=True, device=CPU)
    check("bfloat16", rows, 24, k, norm=True, gated=True, bias=True, out_dtype=F32, device=CPU)
    assert computed_by == ["many rows"] * 2


@pytest.mark.parametrize(("rows", "n", "k"), [(2, 37, 40), (17, 37, 64), (260, 40, 64)])
def test_other_columns_and_more_rows(computed_by: list[str], rows: int, n: int, k: int) -> None:
    check("bfloat16", rows, n, k, norm=True, residual=True, device=CPU)
    assert computed_by == ["the rest"]


@pytest.mark.parametrize("k", [4096, 4104])
def test_one_row_of_a_large_weight(computed_by: list[str], k: int) -> None:
    check("bfloat16", 1, 2050, k, norm=True, residual=True, device=CPU)
    assert computed_by == ["one row"]


def test_one_row_that_is_too_long_for_the_norm(computed_by: list[str]) -> None:
    """The norm is a launch before."""
    check("bfloat16", 1, 500, MAX_NORMED + 512, norm=True, device=CPU)
    assert computed_by == ["one row"]


def test_one_row_of_few_results(computed_by: list[str]) -> None:
    """With many columns they are made as several rows are."""
    check("bfloat16", 1, 40, 320, norm=True, residual=True, device=CPU)
    check("bfloat16", 1, 40, 80, bias=True, out_dtype=F32, device=CPU)
    assert computed_by == ["many rows"] * 2


def test_one_row_of_a_small_weight(computed_by: list[str]) -> None:
    check("bfloat16", 1, 256, 320, norm=True, residual=True, device=CPU)
    assert computed_by == ["the rest"]


@pytest.mark.parametrize(("n", "name"), [(21, "some rows"), (22, "many rows")])
def test_operands_as_they_come(computed_by: list[str], n: int, name: str) -> None:
    """The same bits from x at odd places, from a residual by columns, and from copies that have neither."""
    tensors, _ = weights("bfloat16", n, 128, 128, zero_points=False, seed=1)
    node = CudaLinear()
    packed = node.pack(tensors, act=None)
    x, residual = randn(1, 5, 139).cpu()[:, 1:129], randn(2, n, 5).cpu().T
    plain = node.apply(x.clone(), packed, residual=residual.contiguous())
    assert torch.equal(node.apply(x, packed, residual=residual), plain)
    assert computed_by == [name] * 2
    # Neither a type of results that the kernels do not round to nor no rows at all is refused.
    half = node.apply(x, packed, out_dtype=torch.float16)
    assert (half.dtype, plain.dtype) == (torch.float16, BF16)
    assert node.apply(x[:0], packed).shape == (0, n)
    assert computed_by[2:] == ["the rest"] * 2
