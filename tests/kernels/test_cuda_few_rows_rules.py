"""The rules of the linear nodes of few rows against what their library takes, emulated on the CPU."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from few_rows_support import BF16, EPS, F32, NODES, TILED, own_product, weights
from triton_support import randn

from pymllm_kernels.cuda import few_rows
from pymllm_kernels.cuda.few_rows_library import (
    FORMATS,
    Arguments,
    FewRows,
    FewRowsError,
    Format,
    Operand,
    Plan,
)
from pymllm_kernels.cuda.few_rows_plan import most_warps, one_row_plan, tiles_plan
from pymllm_kernels.triton.launch import LEAST_SHARED

if TYPE_CHECKING:
    from few_rows_emulation import Emulation

pytest_plugins = ("few_rows_emulation",)
pytestmark = pytest.mark.usefixtures("emulated_nodes")


@pytest.mark.parametrize(
    ("form", "rows", "k", "plan"),
    [
        ("bfloat16", 1, 12, Plan(1, 2, True, 5)),  # K
        ("bfloat16", 2, 64, Plan(1, 2, True, 5)),  # rows
        ("bfloat16", 1, 64, Plan(1, 2, True)),  # tiles of bfloat16
        ("bfloat16", 1, 64, Plan(1, 9, True, 5)),  # warps
        ("int8", 2, 96, Plan(1, 2, False)),  # K
        ("int8", 9, 64, Plan(1, 2, False)),  # rows
        ("int8", 2, 64, Plan(1, 2, True)),  # rows in shared memory
        ("int4", 33, 128, Plan(1, 2, False)),  # rows
        ("int4", 9, 128, Plan(1, 2, True)),  # rows in shared memory
        ("int8", 2, 64, Plan(3, 2, False)),  # tiles
        ("int8", 2, 64, Plan(1, 13, False)),  # warps
        ("int4", 20, 128, Plan(4, 2, False)),  # not compiled
        ("int8", 1, 64, Plan(4, 2, True, 8)),  # loads
        ("int4", 2, 128 * 1025, Plan(1, 2, False)),  # columns
    ],
)
def test_what_is_not_compiled_is_refused(form: str, rows: int, k: int, plan: Plan) -> None:
    group = 64 if form == "int4" else 128
    tensors, _ = weights(form, 16, k, group, zero_points=False, seed=0)
    node = NODES[form]()
    packed = node.pack(tensors, act=None)
    with pytest.raises(FewRowsError, match=f"M={rows}, N=16, K={k}: no kernel takes the shape"):
        own_product(node, randn(1, rows, k).cpu(), packed, plan, norm=None, residual=None, out_dtype=BF16)


SHAPES = [
    (4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False), (6144, 2560, False),
    (2560, 4096, False), (9728, 2560, True), (2560, 9728, False), (12288, 4096, True), (4096, 12288, False),
    (151936, 4096, False), (16, 128, False), (33, 32768, False), (25600, 5120, True), (5120, 25600, False),
]  # fmt: skip


@pytest.mark.parametrize(("n", "k", "gated"), SHAPES)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_rules_choose_what_is_compiled_and_fits(
    emulation: Emulation, form: Format, n: int, k: int, gated: bool
) -> None:
    """Every plan that the rules make is one that the library takes, with shared memory of the smallest device."""
    library = emulation.library(form)
    library.emulated_dry()
    bits, numbers = {
        "bfloat16": (16, (1,)),
        "int8": (8, (1, 2, 8)),
        "int4": (4, (1, 2, 8, 9, 16, 17, 32)),
    }[form.weights]
    operand = Operand(torch.empty(0), n, gated, torch.empty(0))
    for sms in (8, 16, 132):
        for rows in numbers:
            norm = (torch.empty(k, dtype=BF16), EPS) if k <= few_rows.MAX_NORMED else None
            if rows == 1 and bits > 4:
                plan = one_row_plan(n, k, sms, gated=gated, bits=bits)
            else:
                plan = tiles_plan(rows, n, k, sms, gated=gated, weights=form.weights)
                assert 1 <= plan.warps <= most_warps(rows, plan.row_tiles, form.weights)
            x = torch.empty(rows, k, dtype=BF16)
            FewRows(library, form)(x, operand, plan, norm=norm, residual=None, dtype=F32)
            assert library.emulated_threads() == 32 * plan.warps
            assert library.emulated_shared() <= LEAST_SHARED
    library.emulated_clear()


def test_which_weights_are_asked_for_while_x_is_on_its_way() -> None:
    """Layers of bfloat16, and gate and up of 8B in int4; neither an output head nor several rows."""
    sms = 132
    assert one_row_plan(6144, 2560, sms, gated=False, bits=16).closer == 2048
    assert one_row_plan(151936, 4096, sms, gated=False, bits=16).closer == 0
    assert one_row_plan(12288, 4096, sms, gated=True, bits=8).closer == 0

    def of_int4(rows: int, n: int, k: int, gated: bool) -> int:
        return tiles_plan(rows, n, k, sms, gated=gated, weights="int4").closer

    assert [of_int4(1, 12288, 4096, True), of_int4(2, 12288, 4096, True)] == [512, 0]
    assert [of_int4(1, 9728, 2560, True), of_int4(1, 4096, 12288, False)] == [0, 0]


@pytest.mark.parametrize("form", TILED)
@pytest.mark.parametrize("row_tiles", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32])
def test_most_warps(emulation: Emulation, form: str, rows: int, row_tiles: int) -> None:
    library = emulation.library(Format(form))
    library.emulated_dry()
    kernels, operand = FewRows(library, Format(form)), Operand(torch.empty(0), 16, False)
    most = most_warps(rows, row_tiles, form)
    for warps in (most, most + 1):
        takes = contextlib.nullcontext() if 0 < warps <= most else pytest.raises(FewRowsError)
        with takes:
            kernels(
                torch.empty(rows, 128, dtype=BF16),
                operand,
                Plan(row_tiles, warps, False),
                norm=None,
                residual=None,
                dtype=BF16,
            )
    library.emulated_clear()


def test_arguments_are_those_of_the_header() -> None:
    header = Path(few_rows.__file__).parent.parent / "csrc" / "cuda" / "few_rows.h"
    text = header.read_text()
    body = text[text.index("struct FewRowsArguments {") : text.index("};")]
    lines = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()[1:]]
    names = [name.split()[-1].lstrip("*") for line in lines if line for name in line.split(",")]
    assert names == [name for name, *_ in Arguments._fields_]
