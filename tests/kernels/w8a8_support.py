"""One call of a W8A8 node against the definitions of `nn.quant_ops`; on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton_support import DEVICE, TINY, randn, rel_error, rms_norm, swiglu

from pymllm_core.nn import quant_ops
from pymllm_core.protocols.kernel import LinearKernel


@dataclass(frozen=True)
class Case:
    """What a call has. n: rows of the weight, [gate; up] with act."""

    rows: int
    n: int
    k: int
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    static: bool = False
    asymmetric: bool = False
    bias: bool = False
    act: str | None = None
    norm: bool = False
    residual: bool = False


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b.T of int8 codes: int64. Sums are far below 2^53."""
    return (a.double() @ b.double().t()).long()


def check(node: LinearKernel, case: Case) -> None:
    """Without a norm and an activation every step is defined to the last bit, and so must the result be."""
    seed, n, k, dtype = case.seed, case.n, case.k, case.dtype
    x = randn(seed, case.rows, k + 8, dtype=dtype, scale=3.0)[:, 8:] + (2 if case.asymmetric else 0)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8).to(DEVICE)
    tensors = {"weight": weight, "weight_scale": randn(seed + 1, n, dtype=torch.float32).abs() * 1e-4}
    if case.bias:
        tensors["bias"] = randn(seed + 2, n, dtype=dtype)
    if case.asymmetric:
        tensors["weight_sum"] = weight.sum(1, dtype=torch.int32)
    if case.static:
        tensors["input_scale"] = torch.tensor(0.05, device=DEVICE)
        if case.asymmetric:
            tensors["input_zero_point"] = torch.tensor(-30, dtype=torch.int32, device=DEVICE)
    norm = (randn(seed + 3, k, dtype=dtype).abs() + 0.1, 1e-6) if case.norm else None
    residual = randn(seed + 4, case.rows, n // 2 if case.act else n, dtype=dtype) if case.residual else None

    codes, scale, zero = quant_ops.quantize_activation(
        (x if norm is None else rms_norm(x, *norm)).float(),
        asymmetric=case.asymmetric,
        scale=tensors.get("input_scale"),
        zero_point=tensors.get("input_zero_point"),
    )
    expected = quant_ops.w8a8_epilogue(
        exact_product(codes, weight),
        scale,
        zero,
        tensors["weight_scale"],
        tensors.get("weight_sum"),
        tensors.get("bias"),
    )
    if case.act is None and residual is not None:
        expected = expected + residual.float()
    packed = node.pack(dict(tensors), act=case.act)
    kept = None if residual is None else residual.clone()  # a node may overwrite it
    out = node.apply(x, packed, norm=norm, residual=kept)
    assert out.dtype == dtype
    if case.act is None and norm is None:
        assert torch.equal(out, expected.to(dtype)), f"{int((out != expected.to(dtype)).sum())} differ"
        return
    wide = expected.double()
    if case.act is not None:
        wide = swiglu(wide)
        wide = wide if residual is None else wide + residual.double()
    # Roundings to dtype: the two factors of an activation, its result, and that with a residual. A norm may move
    # a value over the border of a code, by a last bit, which is 1 / 127 of one of `k` terms.
    roundings = 1 if case.act is None else 3 + case.residual
    assert rel_error(out, wide) < TINY[dtype] * roundings + (2 / 127 / k**0.5 if case.norm else 0.0)
