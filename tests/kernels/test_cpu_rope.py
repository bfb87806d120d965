"""The fused q/k norm, RoPE and cache write against float64."""

from __future__ import annotations

import pytest
import torch
from cpu_support import needs_cpu_kernels, randn, rel_error, rms_norm, threads
from torch import Tensor

from pymllm_kernels.cpu import qk_norm_rope_write

pytestmark = needs_cpu_kernels

# One rounding of the rotated values, and norms that round to the other bf16 now and then.
BOUND = 3e-3
EPS = 1e-6


def table(positions: int, dim: int) -> Tensor:
    angles = torch.outer(
        torch.arange(positions).double(), 10000.0 ** (-torch.arange(dim // 2).double() * 2 / dim)
    )
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin.double()[:, None, :].chunk(2, -1)
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (3, 1, 64), (5, 5, 80), (1, 1, 34)])
@pytest.mark.parametrize("with_norm", [True, False])
def test_matches_float64(
    seed: int, tokens: int, heads: int, kv_heads: int, dim: int, with_norm: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    width = (heads + 2 * kv_heads) * dim
    qkv = randn(g, tokens, width + 8)[:, 4 : width + 4]
    positions = torch.randint(0, 300, (tokens,), generator=g)
    cos_sin = table(300, dim)
    q_weight = randn(g, dim) if with_norm else None
    k_weight = randn(g, dim) if with_norm else None
    slots = torch.randperm(tokens + 9, generator=g)[:tokens]
    if tokens > 2:
        slots[2] = -1
    k_cache = torch.full((tokens + 9, kv_heads, dim), float("nan"), dtype=torch.bfloat16)
    v_cache = k_cache.clone()

    def run() -> Tensor:
        return qk_norm_rope_write(
            qkv, positions, cos_sin, q_weight, k_weight, EPS, slots, k_cache, v_cache, heads,
            kv_heads, dim,
        )  # fmt: skip

    out = run()
    q, k, v = (
        part.reshape(tokens, -1, dim) for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    )
    if with_norm:
        q, k = rms_norm(q, q_weight, EPS), rms_norm(k, k_weight, EPS)
    assert rel_error(out, rotate(q, cos_sin[positions])) < BOUND
    written = slots >= 0
    assert rel_error(k_cache[slots[written]], rotate(k, cos_sin[positions])[written]) < BOUND
    assert torch.equal(v_cache[slots[written]], v[written])
    untouched = torch.ones(tokens + 9, dtype=torch.bool)
    untouched[slots[written]] = False
    assert k_cache[untouched].isnan().all()
    assert v_cache[untouched].isnan().all()
    with threads(1):
        assert torch.equal(run(), out)


def test_wrong_arguments_are_refused() -> None:
    qkv = torch.zeros(2, 4 * 64, dtype=torch.bfloat16)
    cache = torch.zeros(4, 1, 64, dtype=torch.bfloat16)
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="qkv must be"):
        qk_norm_rope_write(qkv[:, 1:], ids, table(4, 64), None, None, EPS, ids, cache, cache, 2, 1, 64)
    with pytest.raises(ValueError, match="must be int64"):
        qk_norm_rope_write(qkv, ids.int(), table(4, 64), None, None, EPS, ids, cache, cache, 2, 1, 64)
