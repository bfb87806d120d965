"""The decode attention in CUDA C++ against float64: on a GPU, or without one emulated on the CPU.

The emulation (`emulated_cuda.h`) compiles the kernel's own source with g++, hardware instructions replaced.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from attention_support import context, expected
from torch import Tensor
from triton_support import DEVICE, TINY, randn, rel_error

from pymllm_core.device import DeviceInfo
from pymllm_core.nn import ops
from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV
from pymllm_core.specs import Want
from pymllm_kernels import plugin
from pymllm_kernels.bundle import BUNDLE_ENV
from pymllm_kernels.cuda import decode_attention, library
from pymllm_kernels.cuda.decode_attention import CudaAttention
from pymllm_kernels.cuda.decode_library import DTYPES, Arguments, DecodeLibrary, shared_bytes
from pymllm_kernels.cuda.decode_plan import Split, choose_split
from pymllm_kernels.recipe import CACHE_ENV, KernelBuildError
from pymllm_kernels.triton.attention import TritonAttention
from pymllm_kernels.triton.launch import Gpu

BF16, F16 = torch.bfloat16, torch.float16
NAN = float("nan")
EPS = 1e-6
HERE = Path(__file__).parent
SOURCES = Path(decode_attention.__file__).parent.parent / "csrc" / "cuda"


@pytest.fixture(scope="module", autouse=True)
def emulation(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where there is no GPU, the backend gets the emulation."""
    if DEVICE.type == "cuda":
        return
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation with")
    folder = tmp_path_factory.mktemp("emulation")

    @functools.cache
    def emulated(dim: int, dtype: torch.dtype, device: torch.device) -> DecodeLibrary:
        target = folder / f"{dim}_{DTYPES[dtype]}.so"
        macros = (f"-DPYMLLM_DIM={dim}", f"-DPYMLLM_HALF={DTYPES[dtype]}", f"-I{SOURCES}", f"-I{HERE}")
        flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas")
        source = HERE / "emulated_decode_attention.cpp"
        subprocess.run([compiler, *flags, *macros, source, "-o", target], check=True)
        return DecodeLibrary(ctypes.CDLL(str(target)))

    patch = pytest.MonkeyPatch()
    patch.setattr(decode_attention, "decode_library", emulated)


class Case:
    """A pass of decodes whose new tokens are not in the cache yet.

    All of the cache that belongs to no token is NaN, as are the places of the new tokens.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        kv_lens: list[int],
        *,
        page: int = 16,
        dtype: torch.dtype = BF16,
        norm: bool = True,
        gap: int = 0,
        seed: int = 0,
    ) -> None:
        count = len(kv_lens)
        self.dtype, self.scale = dtype, dim**-0.5
        self.config = AttentionConfig(heads, kv_heads, dim, page, self.scale, dtype, DEVICE)
        self.backend = CudaAttention(self.config)
        self.ctx, slots = context([1] * count, kv_lens, count, page, self.backend, seed)
        ctx = self.ctx
        ctx.positions = ctx.kv_lens.long() - 1
        rows = torch.arange(count, device=DEVICE)
        ctx.slots = ctx.page_table[rows, ctx.positions // page].long() * page + ctx.positions % page
        self.kv = LayerKV(*(randn(seed + i, slots, kv_heads, dim, dtype=dtype) for i in (1, 2)))
        free = torch.ones(slots, dtype=torch.bool)
        free[self.used(page)] = False
        free[ctx.slots.cpu()] = True
        self.kv.k[free.to(DEVICE)] = NAN
        self.kv.v[free.to(DEVICE)] = NAN
        width = (heads + 2 * kv_heads) * dim
        # Rows of a wider tensor.
        self.qkv = randn(seed + 3, count, width + gap, dtype=dtype, scale=2.0)[:, :width]
        angles = randn(seed + 4, max(kv_lens), dim // 2, dtype=torch.float32)
        self.table = torch.cat((angles.cos(), angles.sin()), dim=1)
        self.weights = [randn(seed + i, dim, dtype=dtype) if norm else None for i in (5, 6)]

    def used(self, page: int) -> Tensor:
        """The slots of all tokens."""
        table = self.ctx.page_table.cpu().long()
        parts = []
        for sequence, length in enumerate(self.ctx.kv_lens_host):
            token = torch.arange(length)
            parts.append(table[sequence, token // page] * page + token % page)
        return torch.cat(parts)

    def run(
        self, backend: CudaAttention | TritonAttention, split: Split | None = None, pdl: bool | None = None
    ) -> Tensor:
        rest = (self.qkv, self.table, *self.weights, EPS, self.kv, self.ctx)
        if isinstance(backend, CudaAttention):
            return backend.prepare_and_attend(*rest, split=split, pdl=pdl)
        return backend.prepare_and_attend(*rest)

    def check(self, split: Split | None = None, *, pdl: bool | None = None) -> Tensor:
        """Run twice, compare with both definitions in float64; the result."""
        ctx, kv, kv_heads = self.ctx, self.kv, self.config.num_kv_heads
        wide = LayerKV(kv.k.double(), kv.v.double())
        weights = [None if w is None else w.double() for w in self.weights]
        table = self.table.to(self.dtype).double()
        q = ops.attention_prep(
            self.qkv.double(), ctx.positions, table, *weights, EPS, ctx.slots, wide.k, wide.v
        )
        before = [cache.view(torch.int16).clone() for cache in (kv.k, kv.v)]
        self.backend.plan(ctx)
        results = []
        for _ in range(2):
            out = self.run(self.backend, split, pdl)
            # Queries and keys are rounded four times, softmax weights and the result once each.
            assert rel_error(out, expected(q, wide, ctx, self.scale)) < 6 * TINY[self.dtype]
            assert rel_error(kv.k[ctx.slots], wide.k[ctx.slots]) < 4 * TINY[self.dtype]
            values = self.qkv.unflatten(1, (-1, self.config.head_dim))[:, -kv_heads:]
            assert torch.equal(kv.v[ctx.slots], values)
            assert not self.backend._counters.any(), "a captured graph would merge too early"
            results.append(out)
        assert torch.equal(*results)
        untouched = torch.ones(len(kv.k), dtype=torch.bool, device=DEVICE)
        untouched[ctx.slots] = False
        for cache, old in zip((kv.k, kv.v), before, strict=True):
            assert torch.equal(cache.view(torch.int16)[untouched], old[untouched])
        return out


SPLITS = [
    Split(1),
    Split(4),
    Split(4, cluster=4),
    Split(16, cluster=16),
    Split(16, cluster=2),
    Split(16),
    Split(2, least=3),
    Split(2, warps=8),
    Split(8, cluster=2, warps=8),
]


def skip_clusters(split: Split) -> None:
    if split.cluster > 1 and DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters need capability 9.0")


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kv_lens", [[1], [2, 15, 16, 17], [63, 64, 65, 300]], ids=str)
def test_lengths_and_splits(split: Split, kv_lens: list[int]) -> None:
    skip_clusters(split)
    Case(4, 2, 128, kv_lens, seed=len(kv_lens)).check(split)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8, 9, 16])
def test_groups(group: int, dim: int) -> None:
    Case(group, 1, dim, [80, 1], norm=group != 4, dtype=F16 if group % 2 else BF16, seed=group).check(
        Split(2)
    )


@pytest.mark.parametrize("page", [1, 2, 16, 32, 256])
def test_pages(page: int) -> None:
    Case(4, 2, 64, [200, 1, 33], page=page, seed=page).check()


def test_rows_of_a_wider_projection() -> None:
    Case(4, 2, 64, [70, 3], gap=64, seed=1).check()
    Case(4, 2, 64, [70, 3], gap=3, seed=2).check()  # not at 16 bytes: copied first


def test_one_norm_alone() -> None:
    for absent in (0, 1):
        case = Case(2, 1, 64, [20], seed=absent)
        case.weights[absent] = None
        case.check()


@pytest.mark.parametrize("length", [0, 1])
def test_padding_writes_nothing(length: int) -> None:
    case = Case(2, 1, 64, [20, 1], seed=3)
    case.ctx.kv_lens[1] = length
    case.ctx.slots[1] = -1
    case.ctx.page_table[1] = 1 << 30  # names no page
    before = case.kv.k.view(torch.int16).clone()
    case.backend.plan(case.ctx)
    out = case.run(case.backend)
    changed = (case.kv.k.view(torch.int16) != before).any(-1).any(-1).nonzero().flatten().tolist()
    assert changed == [int(case.ctx.slots[0])]
    # The new token alone: its value.
    value = case.qkv[1].view(-1, 64)[-1]
    assert torch.equal(out[1], value.expand(2, 64))


@pytest.mark.parametrize("split", [Split(1), Split(4), Split(4, cluster=2)], ids=str)
def test_decodes_that_are_prepared(split: Split) -> None:
    skip_clusters(split)
    case = Case(4, 2, 64, [1, 64, 130, 300], seed=5)
    case.kv.k[case.ctx.slots], case.kv.v[case.ctx.slots] = 0.5, 0.25
    q = randn(9, 4, 4, 64, scale=2.0)
    out = torch.full_like(q, NAN)
    case.backend.decode(q, case.kv, case.ctx, out, split=split)
    assert rel_error(out, expected(q, case.kv, case.ctx, case.scale)) < 2 * TINY[BF16]
    case.ctx.kv_lens[2] = 0  # padding without tokens
    case.backend.decode(q, case.kv, case.ctx, out, split=split)
    assert not out[2].any()


def test_mixed_passes() -> None:
    """Decodes by this kernel, prompts by Triton's, in one call."""
    backend = CudaAttention(AttentionConfig(4, 2, 64, 16, 0.125, BF16, DEVICE))
    ctx, slots = context([1, 1, 5], [40, 3, 20], 2, 16, backend, 0)
    kv = LayerKV(*(randn(i, slots, 2, 64) for i in (1, 2)))
    q = randn(3, 7, 4, 64, scale=2.0)
    backend.plan(ctx)
    assert rel_error(backend.attend(q, kv, ctx), expected(q, kv, ctx, 0.125)) < 2 * TINY[BF16]


def test_what_it_does_not_take_is_named() -> None:
    for change in ({"head_dim": 96}, {"page_size": 24}, {"dtype": torch.float32}, {"num_heads": 17}):
        good = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "page_size": 16, "dtype": BF16}
        with pytest.raises(ValueError, match="takes head_dim"):
            CudaAttention(AttentionConfig(**(good | change), scale=1.0, device=DEVICE))
    case = Case(2, 1, 64, [20])
    case.kv = LayerKV(case.kv.k.half(), case.kv.v.half())
    with pytest.raises(ValueError, match="the cache must be"):
        case.run(case.backend)
    case = Case(2, 1, 64, [20])
    case.table = case.table.double()
    with pytest.raises(ValueError, match="cos_sin must be"):
        case.run(case.backend)


def test_arguments_are_those_of_the_header() -> None:
    text = (SOURCES / "decode_arguments.h").read_text()
    body = text[text.index("struct DecodeArguments {") : text.index("};")]
    names = [line.split(";")[0].split()[-1].lstrip("*") for line in body.splitlines()[1:] if ";" in line]
    assert names == [name for name, *_ in Arguments._fields_]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "gpu",
    [Gpu(132, 9, 227 << 10, pdl=True), Gpu(128, 8, 99 << 10, pdl=False), Gpu(16, 8, 163 << 10, pdl=False)],
    ids=["H200", "RTX 4090", "Orin"],
)
def test_chosen_splits_can_be_launched(gpu: Gpu, dim: int) -> None:
    for items in (1, 8, 16, 64, 132, 256, 2048, 20000):
        for width in (16, 300, 40960):
            split = choose_split(items, width, gpu, dim)
            for number in (split.splits, split.cluster, split.warps):
                assert number & (number - 1) == 0
            assert split.cluster <= split.splits <= 16
            assert shared_bytes(dim, split.warps, split.cluster) <= gpu.shared
            assert split.cluster == 1 or gpu.major >= 9
            # No more parts than the longest sequence has blocks.
            assert split.splits == 1 or split.splits // 2 * 256 < width
            assert split.warps == 4 or split.splits * items <= gpu.sms


def test_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {spec.name: spec for spec in plugin.pymllm_attention_backends()}
    device = DeviceInfo("cuda", "a GPU", 1 << 34, 1 << 34, capability=(8, 7))
    good = {"head_dim": 128, "group": 2, "page_size": 16, "same_kv_dtype": 1}

    def reason(**change: int) -> str | None:
        return specs["cuda"].needs.reason(Want(device, "bfloat16", {**good, **change}))

    assert specs["cuda"].priority > specs["triton"].priority
    assert reason(head_dim=256) == "head_dim=256 is none of 64, 128"
    assert reason(group=17) == "group=17 is over 16"
    assert "page_size=24" in (reason(page_size=24) or "")
    assert "same_kv_dtype=0" in (reason(same_kv_dtype=0) or "")

    def missing() -> Path:
        raise KernelBuildError("no CUDA compiler found")

    monkeypatch.setattr(library, "find_nvcc", missing)
    monkeypatch.setenv(CACHE_ENV, str(tmp_path))
    monkeypatch.delenv(BUNDLE_ENV, raising=False)
    assert (reason() or "").startswith(
        "no bundle holds decode_attention_sm_87_128_bfloat16, and it cannot be compiled"
    )


# ---- on a GPU ----

MODELS = [(16, 8, 128), (32, 8, 128), (14, 2, 64), (40, 8, 128), (16, 1, 64), (8, 8, 128)]
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 255, 1000, 3000]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), MODELS)
@pytest.mark.parametrize(("page", "dtype"), [(16, BF16), (1, F16), (32, BF16)])
def test_shapes_of_models(heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype) -> None:
    case = Case(heads, kv_heads, dim, LENGTHS, page=page, dtype=dtype, norm=page != 1, seed=page)
    older = torch.cuda.get_device_capability()[0] < 9
    for split in (None, *SPLITS):
        if not (split and split.cluster > 1 and older):
            out = case.check(split, pdl=False)
            assert older or torch.equal(out, case.check(split, pdl=True)), split


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), MODELS)
def test_results_are_tritons(heads: int, kv_heads: int, dim: int) -> None:
    for lengths in ([4000], [200], [1 + 37 * i for i in range(100)]):
        case = Case(heads, kv_heads, dim, lengths, seed=len(lengths))
        ours = case.check()
        keys = case.kv.k[case.ctx.slots].clone()
        other = TritonAttention(case.config)
        other.plan(case.ctx)
        theirs = case.run(other)
        assert rel_error(ours, theirs) < 6 * TINY[BF16]
        # Of the keys, a sum in another order may round some otherwise.
        assert (keys != case.kv.k[case.ctx.slots]).float().mean() < 0.01


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths() -> None:
    case = Case(16, 8, 128, [2000, 2000])
    case.check()
    context: ForwardContext = case.ctx
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(case.backend)
    for lengths in ([1, 2000], [64, 65], [1999, 130]):
        context.kv_lens.copy_(torch.tensor(lengths))
        context.kv_lens_host = lengths
        context.positions.copy_(context.kv_lens.long() - 1)
        rows = torch.arange(2, device=DEVICE)
        pages = context.page_table[rows, context.positions // 16].long()
        context.slots.copy_(pages * 16 + context.positions % 16)
        case.kv.k.copy_(randn(lengths[0], *case.kv.k.shape))
        case.kv.v.copy_(randn(lengths[1], *case.kv.v.shape))
        wanted = case.check()
        graph.replay()
        assert torch.equal(out, wanted)
