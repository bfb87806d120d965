"""Kernels of the quantised operations against float64 definitions written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pymllm_core.builtin.cpu_int4 import Int4PackLinear
from pymllm_core.builtin.cpu_int8 import Int8PackLinear, OneDnnInt8Linear
from pymllm_core.builtin.torch_quant import TorchW4A16, TorchW8A8, TorchW8A16
from pymllm_core.device import cpu_flags
from pymllm_core.nn import quant_ops
from pymllm_core.nn.quant_ops import (
    int8_matmul,
    quantize_per_token_int8,
    quantize_per_token_int8_asym,
    quantize_static_int8,
)
from pymllm_core.plugins import Candidate, build_registry
from pymllm_core.select import choose
from pymllm_core.specs import KernelSpec, Want
from pymllm_quant_ct.packing import pack

BF16_BOUND = 4e-3  # of the norm: weights and result are rounded to bfloat16 once each, measured 2.8e-3
needs_vnni = pytest.mark.skipif("avx512_vnni" not in cpu_flags(), reason="the kernel needs AVX512-VNNI")
needs_avx2 = pytest.mark.skipif("avx2" not in cpu_flags(), reason="the kernel needs AVX2")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weight_only(
    bits: int, n: int, k: int, groups: int, *, symmetric: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors as a kernel's `pack` gets them, and the weight [n, k] in float64."""
    generator = torch.Generator().manual_seed(n * k + groups)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    scale = (torch.rand(n, groups, generator=generator) * 0.01 + 0.001).to(dtype)
    tensors = {"weight": pack(codes, 4).view(torch.uint8) if bits == 4 else codes, "scale": scale}
    wide = codes.double().view(n, groups, -1)
    if not symmetric:
        zero_point = torch.randint(-half, half, (n, groups), generator=generator, dtype=torch.int8)
        tensors["zero_point"] = zero_point
        wide = wide - zero_point.double()[:, :, None]
    return tensors, (wide * scale.double()[:, :, None]).view(n, k)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@needs_avx2
@pytest.mark.parametrize("rows", [1, 7, 95, 96, 130])
@pytest.mark.parametrize(
    ("n", "k", "groups"), [(16, 32, 1), (48, 64, 2), (80, 256, 2), (192, 128, 1), (64, 96, 1), (144, 512, 2)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4pack(rows: int, n: int, k: int, groups: int, symmetric: bool) -> None:
    tensors, weight = weight_only(4, n, k, groups, symmetric=symmetric)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()
    kernel, reference = Int4PackLinear(), TorchW4A16()
    expected = x.double() @ weight.T
    assert relative(kernel.apply(x, kernel.pack(dict(tensors), act=None)), expected) < BF16_BOUND
    assert relative(reference.apply(x, reference.pack(tensors, act=None)), expected) < BF16_BOUND


@needs_avx2
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize(("n", "k"), [(3, 16), (50, 48), (64, 128)])
def test_int8pack(rows: int, n: int, k: int) -> None:
    tensors, weight = weight_only(8, n, k, 1, symmetric=True)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()
    kernel, reference = Int8PackLinear(), TorchW8A16()
    expected = x.double() @ weight.T
    assert relative(kernel.apply(x, kernel.pack(dict(tensors), act=None)), expected) < BF16_BOUND
    assert relative(reference.apply(x, reference.pack(tensors, act=None)), expected) < BF16_BOUND


def test_the_reference_dequantises_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = weight_only(4, 50, 64, 2, symmetric=False, dtype=torch.float32)
    tensors["bias"] = torch.arange(50.0)
    kernel, x = TorchW4A16(), torch.randn(3, 64)
    whole = kernel.apply(x, tensors)
    monkeypatch.setattr("pymllm_core.builtin.torch_quant.BLOCK", 64 * 7)
    assert torch.allclose(kernel.apply(x, tensors), whole, atol=1e-5)


# ---- W8A8 ----


@settings(max_examples=50, deadline=None)
@given(
    m=st.integers(1, 20), n=st.integers(1, 40), k=st.integers(1, 2100), extreme=st.booleans(), seed=st.integers(0, 99)
)  # fmt: skip
def test_int32_accumulation_is_exact(m: int, n: int, k: int, extreme: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = -128 if not extreme else 126
    a = torch.randint(low, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(low, 128, (n, k), generator=generator, dtype=torch.int8)
    assert torch.equal(int8_matmul(a, b).long(), a.long() @ b.long().T)


def test_int32_accumulation_over_one_column() -> None:
    a, b = torch.tensor([[44], [-3]], dtype=torch.int8), torch.tensor([[-81], [-11], [127]], dtype=torch.int8)
    assert int8_matmul(a, b).tolist() == [[-3564, -484, 5588], [243, 33, -381]]


@pytest.mark.parametrize("k", [1, 1023, 1025, 3000])
def test_int32_accumulation_elsewhere_than_on_a_cpu(k: int) -> None:
    """The way of devices without a product of integers, in pieces that float32 holds exactly."""
    a, b = torch.full((2, k), -128, dtype=torch.int8), torch.full((3, k), -128, dtype=torch.int8)
    b[1] = 127
    pieces = quant_ops.float_pieces(a, b)
    assert torch.equal(pieces.long(), a.long() @ b.long().T)


def w8a8(n: int, k: int, *, static: bool, symmetric: bool, bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    tensors = {"weight": weight, "weight_scale": torch.rand(n, generator=generator) * 0.01 + 0.001}
    if bias:
        tensors["bias"] = torch.randn(n, generator=generator).bfloat16()
    if not symmetric:
        tensors["weight_sum"] = weight.sum(1, dtype=torch.int32)
    if static:
        tensors["input_scale"] = torch.tensor(0.03)
        if not symmetric:
            tensors["input_zero_point"] = torch.tensor(-17, dtype=torch.int32)
    return tensors


def expected_w8a8(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """scale · weight_scale · (codes - zero_point) @ weight.T + bias, in float64 from the codes."""
    zero_point: Any = 0
    if "input_scale" in tensors:
        scale = tensors["input_scale"].double()
        codes = quantize_static_int8(x, tensors["input_scale"], tensors.get("input_zero_point"))
        zero_point = tensors.get("input_zero_point", torch.tensor(0)).double()
    elif "weight_sum" in tensors:
        codes, s, z = quantize_per_token_int8_asym(x)
        scale, zero_point = s.double(), z.double()
    else:
        codes, s = quantize_per_token_int8(x)
        scale = s.double()
    weight = tensors["weight"].double() * tensors["weight_scale"].double()[:, None]
    y = ((codes.double() - zero_point) * scale) @ weight.T
    return y + tensors["bias"].double() if "bias" in tensors else y


@pytest.mark.parametrize("kernel", [TorchW8A8, pytest.param(OneDnnInt8Linear, marks=needs_vnni)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 96), (5, 33, 70), (17, 7, 1000)])
def test_w8a8(kernel: Any, static: bool, symmetric: bool, m: int, n: int, k: int) -> None:
    tensors = w8a8(n, k, static=static, symmetric=symmetric)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    x[-1] = 0
    made = kernel()
    found = made.apply(x, made.pack(dict(tensors), act=None))
    assert relative(found, expected_w8a8(x, tensors)) < 1e-6


@needs_vnni
def test_onednn_gives_the_bits_of_the_definition() -> None:
    """Also for extreme codes, of which sums of pairs would not fit 16 bits."""
    tensors = w8a8(32, 4096, static=False, symmetric=True)
    tensors["weight"][:16] = -128
    x = torch.randn(9, 4096)
    x[0] = 1.0
    x[1, ::2] = -1.0
    one, other = TorchW8A8(), OneDnnInt8Linear()
    assert torch.equal(
        one.apply(x, one.pack(dict(tensors), act=None)), other.apply(x, other.pack(dict(tensors), act=None))
    )


def test_quantising_rows() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0, 0, 0, 0, 0], [1.27, 0, 0, 0, -0.635]])
    codes, scale = quantize_per_token_int8(x)
    # Half to even, as cvt.rni.
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0] * 5, [127, 0, 0, 0, -64]]
    assert scale.flatten().tolist() == pytest.approx([1.0, 0.0, 0.01])


@given(seed=st.integers(0, 999), shift=st.sampled_from([0.0, 3.0, -40.0]))
def test_asymmetric_rows_come_back_within_half_a_step(seed: int, shift: float) -> None:
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) + shift
    x[2] = shift
    codes, scale, zero_point = quantize_per_token_int8_asym(x)
    back = (codes.double() - zero_point.double()) * scale.double()
    # The zero point is rounded, too, so an end of the range may be cut by half a step more.
    assert bool(((back - x.double()).abs() <= 1.01 * scale.double() + 1e-5).all())


# ---- which kernel serves which shape ----


@pytest.mark.parametrize(
    ("operation", "shape", "dtype", "expected"),
    [
        ("w4a16_linear", {"K": 128, "N": 64, "group_size": 32, "groups": 4, "g_idx": 0}, "bfloat16", "int4pack"),
        ("w4a16_linear", {"K": 96, "N": 64, "group_size": 96, "groups": 1, "g_idx": 0}, "bfloat16", "int4pack-channel"),
        ("w4a16_linear", {"K": 128, "N": 64, "group_size": 32, "groups": 4, "g_idx": 1}, "bfloat16", "torch"),
        ("w4a16_linear", {"K": 128, "N": 60, "group_size": 32, "groups": 4, "g_idx": 0}, "bfloat16", "torch"),
        ("w4a16_linear", {"K": 128, "N": 64, "group_size": 32, "groups": 4, "g_idx": 0}, "float32", "torch"),
        ("w4a16_linear", {"K": 48, "N": 64, "group_size": 16, "groups": 3, "g_idx": 0}, "bfloat16", "torch"),
        ("w8a16_linear", {"K": 64, "N": 5, "groups": 1, "symmetric": 1, "g_idx": 0}, "bfloat16", "int8pack"),
        ("w8a16_linear", {"K": 60, "N": 64, "groups": 1, "symmetric": 1, "g_idx": 0}, "bfloat16", "torch"),
        ("w8a16_linear", {"K": 64, "N": 64, "groups": 2, "symmetric": 1, "g_idx": 0}, "bfloat16", "torch"),
        ("w8a16_linear", {"K": 64, "N": 64, "groups": 1, "symmetric": 0, "g_idx": 0}, "bfloat16", "torch"),
        ("w8a8_linear", {"K": 70, "N": 33, "static": 0, "symmetric": 1}, "float32", "onednn"),
    ],
)  # fmt: skip
def test_no_kernel_is_chosen_for_a_shape_that_it_does_not_claim(
    operation: str, shape: dict[str, int], dtype: str, expected: str
) -> None:
    from pymllm_core.device import DeviceInfo

    core = "pymllm_core.builtin.plugin"
    registry = build_registry([Candidate(core, core, "0", core)])
    among = [found for found in registry.all(KernelSpec) if found.spec.operation == operation]
    for flags, name in ((frozenset({"avx2", "avx512_vnni"}), expected), (frozenset[str](), "torch")):
        device = DeviceInfo("cpu", "a CPU", 1, 1, cpu_flags=flags)
        chosen = choose(registry, KernelSpec, Want(device, dtype, shape), what="kernel", among=among)
        assert chosen.spec.name == name
    gpu = DeviceInfo("cuda", "a GPU", 1, 1, capability=(9, 0))
    assert (
        choose(registry, KernelSpec, Want(gpu, dtype, shape), what="kernel", among=among).spec.name == "torch"
    )


def test_the_scratch_buffer_of_the_engine_serves_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine makes it in inference mode; whoever calls a kernel elsewhere in the process writes into it, too."""
    from pymllm_core.builtin import scratch

    monkeypatch.setattr(scratch._Scratch, "buffer", torch.empty(0))
    with torch.inference_mode():
        scratch.take(2, 3, torch.bfloat16).zero_()
    scratch.take(2, 3, torch.bfloat16).zero_()
