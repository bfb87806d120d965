"""The linear nodes of few rows in CUDA C++: on a GPU against float64; plans and packing on any machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_support import TINY, randn, rel_error, rms_norm, swiglu

from pymllm_core.nn import quant_ops
from pymllm_kernels.cuda import few_rows_plan
from pymllm_kernels.cuda.few_rows import CudaLinear, CudaW4A16, CudaW8A8, to_constants, to_tiles
from pymllm_kernels.cuda.few_rows_library import FORMATS, MAX_STAGED, UNIT, FewRows, Operand, Plan
from pymllm_kernels.triton import launch

BF16, F32 = torch.bfloat16, torch.float32
NODES = {"bfloat16": CudaLinear, "int8": CudaW8A8, "int4": CudaW4A16}


def randint(seed: int, low: int, high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def weights(
    form: str, n: int, k: int, group: int, *, zero_points: bool, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """What `pack` receives, and the same dequantised in float64; on the CPU."""
    if form == "bfloat16":
        weight = randn(seed, n, k, scale=k**-0.5).cpu()
        return {"weight": weight}, weight.double()
    if form == "int8":
        codes = randint(seed, -128, 128, n, k).to(torch.int8)
        scale = randint(seed + 1, 1, 100, n).float() / 64 / 100 * k**-0.5
        return {"weight": codes, "weight_scale": scale}, codes.double() * scale.double()[:, None]
    packed = randint(seed, 0, 256, n, k // 2).to(torch.uint8)
    scale = (randint(seed + 1, 1, 100, n, k // group) / 400 * k**-0.5).to(BF16)
    zero = randint(seed + 2, -8, 8, n, k // group).to(torch.int8) if zero_points else None
    codes = quant_ops.unpack_int4(packed, k)
    tensors = {"weight": packed, "scale": scale} | ({} if zero is None else {"zero_point": zero})
    wide = codes.double().view(n, -1, group) - (0 if zero is None else zero.double()[:, :, None])
    return tensors, (wide * scale.double()[:, :, None]).view(n, k)


def check(
    form: str,
    rows: int,
    n: int,
    k: int,
    *,
    seed: int = 0,
    gated: bool = False,
    norm: bool = False,
    bias: bool = False,
    residual: bool = False,
    out_dtype: torch.dtype = BF16,
    group: int = 128,
    zero_points: bool = False,
    plan: Plan | None = None,
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> None:
    """One product of a node against float64. n: results."""
    device = torch.device("cuda")
    total = 2 * n if gated else n
    tensors, wide_weight = weights(form, total, k, group, zero_points=zero_points, seed=seed)
    if bias:
        tensors["bias"] = (
            randn(seed + 3, total).cpu().float() if form == "int8" else randn(seed + 3, total).cpu()
        )
    x = randn(seed + 4, rows, k + 16).to(device)[:, 8 : k + 8]  # rows that lie apart
    add = randn(seed + 5, rows, n + 5).to(device)[:, 3 : n + 3] if residual else None
    gain = (randn(seed + 6, k).to(device), 1e-6) if norm else None
    node = NODES[form]()
    packed = node.pack({name: t.to(device) for name, t in tensors.items()}, act="silu_mul" if gated else None)
    if plan is not None:
        assert monkeypatch is not None
        monkeypatch.setattr("pymllm_kernels.cuda.few_rows.one_row_plan", lambda *_, **__: plan)
        monkeypatch.setattr("pymllm_kernels.cuda.few_rows.tiles_plan", lambda *_, **__: plan)
    # Poison what the caching allocator will hand out for the result.
    torch.full((rows, n), float("nan"), dtype=out_dtype, device=device)
    out = node.apply(x, packed, norm=gain, residual=None if add is None else add.clone(), out_dtype=out_dtype)
    wide = x.double() if gain is None else rms_norm(x, *gain)
    if form == "int8":
        codes, scale = quant_ops.quantize_per_token_int8(wide.float())
        # A code on the border between two may fall on either side: the norm is not rounded here.
        wide = codes.double() * scale.double()
    y = wide @ wide_weight.to(device).T
    if bias:
        y = y + tensors["bias"].to(device).double()
    if gated:
        y = swiglu(y)
    if add is not None:
        y = y + add.double()
    assert out.shape == (rows, n)
    assert out.dtype == out_dtype
    # One rounding of the result, up to two of the normed row; with many rows, cuBLAS between kernels rounds the
    # product, which SiLU is made of, and int4 weights are widened. 1e-5 for float32 sums of up to 10^4 terms; those
    # of int4 codes are of numbers 30 times as large, less what they are offset by.
    many = rows > {"bfloat16": 16, "int8": 16, "int4": 64}[form]
    bound = (1e-4 if form == "int4" else 1e-5) + TINY[BF16] * (
        (out_dtype == BF16) + 2 * norm + many * (2 + (form == "int4"))
    )
    if form == "int8" and norm:
        bound += 1 / 127 / 8  # a few codes of many
    assert rel_error(out, y) < bound


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
    Plan(row_tiles, warps, True, ahead, blocks)
    for row_tiles, ahead in ((1, 2), (1, 8), (2, 4), (4, 2), (4, 4))
    for warps in (1, 8)
    for blocks in (3, 999)
]
TILES = [Plan(r, w, staged) for r, w in ((1, 1), (1, 12), (2, 5), (2, 8), (4, 4)) for staged in (True, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ONE_ROW, ids=str)
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_every_plan_of_one_row(form: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    check(form, 1, 8209, 1088, norm=True, residual=True, plan=plan, monkeypatch=monkeypatch)
    check(form, 1, 4099, 4160, gated=True, plan=plan, monkeypatch=monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", TILES, ids=str)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("form", list(UNIT))
def test_every_plan_of_tiles(form: str, rows: int, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    if plan.row_tiles > 1:
        check(form, rows, 70, 1152, gated=True, norm=True, plan=plan, monkeypatch=monkeypatch)
    check(form, rows, 70, 1152, residual=True, plan=plan, monkeypatch=monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("form", list(UNIT))
def test_a_chain_with_and_without_dependent_launch(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        chain(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x)
        for _ in range(3):
            graph.replay()
        early = out.clone()
        properties = launch.gpu(device)
        late = launch.Gpu(properties.sms, properties.major, properties.shared, pdl=False)
        with launch.pretend(late):
            assert torch.equal(chain(x), early)


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


SHAPES = [
    (4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False), (6144, 2560, False),
    (2560, 4096, False), (9728, 2560, True), (2560, 9728, False), (12288, 4096, True), (4096, 12288, False),
    (151936, 4096, False), (16, 128, False), (33, 32768, False), (25600, 5120, True), (5120, 25600, False),
]  # fmt: skip


@pytest.mark.parametrize(("n", "k", "gated"), SHAPES)
@pytest.mark.parametrize("sms", [8, 16, 132])
def test_plans_stay_within_what_the_kernels_take(n: int, k: int, gated: bool, sms: int) -> None:
    """Warps of csrc/cuda/few_rows.cu's `max_warps`; shared memory of the smallest device, 99 KB."""
    for bits in (8, 16):
        plan = few_rows_plan.one_row_plan(n, k, sms, gated=gated, bits=bits)
        assert (plan.row_tiles, plan.ahead) in {(r, a) for r in (1, 2, 4) for a in (2, 4, 8)} - {(4, 8)}
        assert 1 <= plan.warps <= 8
        assert plan.staged
        assert plan.blocks >= sms
    for form in UNIT:
        # One row of the other formats has a plan of its own.
        for rows in (1, 2, 8, 9, 16, 32) if form == "int4" else (2, 8):
            plan = few_rows_plan.tiles_plan(rows, n, k, sms, gated=gated, normed=k <= 8192, weights=form)
            limit = (
                8
                if rows > 8 or plan.row_tiles == 2
                else {1: 12, 4: 4 if form == "int4" else 8}[plan.row_tiles]
            )
            assert 1 <= plan.warps <= limit
            assert plan.row_tiles > 1 or not gated
            assert not plan.staged or rows <= MAX_STAGED
            x = rows * (k + 64) * 2 if plan.staged and form != "int8" else rows * (3 * k + 64) * plan.staged
            gain = 2 * k if k <= 8192 else 0
            assert x + gain + 2080 + plan.warps * rows * (16 * plan.row_tiles + 4) * 4 <= launch.LEAST_SHARED


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
