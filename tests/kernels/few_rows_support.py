"""What the tests of the linear nodes of few rows share: weights, and one product against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton_support import DEVICE, TINY, randn, rel_error, rms_norm, swiglu

from pymllm_core.nn import quant_ops
from pymllm_core.protocols.kernel import Norm
from pymllm_kernels.cuda.few_rows import CudaLinear, CudaW4A16, CudaW8A8, PackedInt4, columns_adjacent, ready
from pymllm_kernels.cuda.few_rows_library import FewRows, Plan
from pymllm_kernels.triton import launch

BF16, F32 = torch.bfloat16, torch.float32
EPS = 0.25
"""Of the norm: large enough that a kernel without it is wrong."""

LAYERS = {
    "0.6B": ((4096, 1024), (1024, 2048), (3072, 1024), (1024, 3072)),
    "4B": ((6144, 2560), (2560, 4096), (9728, 2560), (2560, 9728)),
    "8B": ((6144, 4096), (4096, 4096), (12288, 4096), (4096, 12288)),
}
"""n, K of a layer of Qwen3: QKV, output, gate and up (gated), down."""

NODES: dict[str, Any] = {"bfloat16": CudaLinear, "int8": CudaW8A8, "int4": CudaW4A16}
TILED = ("int8", "int4")
"""Formats of weights of which tensor cores multiply tiles."""

TILES_OF = (("int8", False), ("int4", False), ("int4", True))
"""They, and whether there are tiles that hold x in shared memory, or that do not."""


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


def own_product(
    node: Any,
    x: Tensor,
    packed: Any,
    plan: Plan,
    *,
    norm: Norm | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The node's product by our kernels with this plan, whatever the node's rules would say."""
    kernels: FewRows = packed.kernels if isinstance(packed, PackedInt4) else node._kernels
    return kernels(
        ready(x), packed.own, plan, norm=norm, residual=columns_adjacent(residual), dtype=out_dtype
    )


def given(
    seed: int, rows: int, n: int, k: int, device: torch.device, *, norm: bool, residual: bool
) -> tuple[Tensor, Tensor | None, Norm | None]:
    """x and the residual, whose rows lie apart, and the norm of a product."""
    x = randn(seed + 4, rows, k + 16).to(device)[:, 8 : k + 8]
    add = randn(seed + 5, rows, n + 5).to(device)[:, 3 : n + 3] if residual else None
    return x, add, (randn(seed + 6, k).to(device), EPS) if norm else None


def ended(y: Tensor, bias: Tensor | None, add: Tensor | None, *, gated: bool) -> Tensor:
    """What follows a product, in float64."""
    if bias is not None:
        y = y + bias.to(y.device).double()
    if gated:
        y = swiglu(y)
    return y if add is None else y + add.double()


def check_early_launches(chain: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """In a graph; without early launches the bits are the same."""
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(3):
        graph.replay()
    early = out.clone()
    late = dataclasses.replace(launch.gpu(x.device), pdl=False)
    with launch.pretend(late):
        assert torch.equal(chain(x), early)


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
    device: torch.device = DEVICE,
) -> Tensor:
    """One product of a node against float64. n: results. plan: ours with this plan. Returns the result."""
    total = 2 * n if gated else n
    tensors, wide_weight = weights(form, total, k, group, zero_points=zero_points, seed=seed)
    if bias:
        tensors["bias"] = randn(seed + 3, total).cpu().to(F32 if form == "int8" else BF16)
    x, add, gain = given(seed, rows, n, k, device, norm=norm, residual=residual)
    node = NODES[form]()
    packed = node.pack({name: t.to(device) for name, t in tensors.items()}, act="silu_mul" if gated else None)
    # Poison what the caching allocator will hand out for the result.
    torch.full((rows, n), float("nan"), dtype=out_dtype, device=device)
    if plan is None:
        # A kernel for many rows may overwrite its residual.
        mine = None if add is None else add.clone()
        out: Tensor = node.apply(x, packed, norm=gain, residual=mine, out_dtype=out_dtype)
    else:
        out = own_product(node, x, packed, plan, norm=gain, residual=add, out_dtype=out_dtype)
    wide = x.double() if gain is None else rms_norm(x, *gain)
    if form == "int8":
        codes, scale = quant_ops.quantize_per_token_int8(wide.float())
        # A code on the border between two may fall on either side: the norm is not rounded here.
        wide = codes.double() * scale.double()
    y = ended(wide @ wide_weight.to(device).T, tensors.get("bias"), add, gated=gated)
    assert out.shape == (rows, n)
    assert out.dtype == out_dtype
    # One rounding of the result, up to two of the normed row; with many rows, cuBLAS between kernels rounds the
    # product, which SiLU is made of, and int4 weights are widened. Float32 sums lose more the longer they are;
    # those of int4 codes are of numbers 30 times as large, less what they are offset by.
    many = plan is None and rows > {"bfloat16": 16, "int8": 16, "int4": 64}[form]
    bound = (
        (1e-4 if form == "int4" else 1e-5)
        + 3e-9 * k
        + TINY[BF16] * ((out_dtype == BF16) + 2 * norm + many * (2 + (form == "int4")))
    )
    if form == "int8" and norm:
        bound += 1 / 127 / 8  # a few codes of many
    assert rel_error(out, y) < bound
    return out
