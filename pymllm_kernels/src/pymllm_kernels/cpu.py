"""The CPU kernels: what the rest of pymllm imports.

All functions run on the calling thread's OpenMP pool, the one torch uses; call them from one
thread of the engine (a second calling thread would get a pool of its own). The CPU must have
``REQUIRED_CPU_FLAGS``.
"""

from __future__ import annotations

import torch

from pymllm_kernels.cpu_attention import paged_attention, qk_norm_rope_write
from pymllm_kernels.cpu_library import REQUIRED_CPU_FLAGS
from pymllm_kernels.cpu_linear import CpuLinear
from pymllm_kernels.cpu_tiles import PackedLinear
from pymllm_kernels.cpu_w8a8 import CpuW8A8Linear
from pymllm_kernels.cpu_weight_only import CpuWeightOnlyLinear

__all__ = [
    "REQUIRED_CPU_FLAGS",
    "CpuLinear",
    "CpuW8A8Linear",
    "CpuWeightOnlyLinear",
    "PackedLinear",
    "paged_attention",
    "qk_norm_rope_write",
    "self_check",
]


def self_check() -> None:
    """Run one small linear layer of each format and one attention step and compare them with float64.

    Raises:
        pymllm_kernels.jit.KernelBuildError: the kernels do not compile.
        RuntimeError: a result is off.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    x, weight = random(3, 70), random(40, 70)
    linear = CpuLinear()
    _compare("linear", linear.apply(x, linear.pack(weight)), x.double() @ weight.double().T)

    codes = torch.randint(-128, 128, (40, 70), generator=generator, dtype=torch.int8)
    scale = torch.rand(40, generator=generator)
    w8a8 = CpuW8A8Linear()
    packed = w8a8.pack({"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(1.0)})
    expected = x.round().double() @ codes.double().T * scale.double()
    _compare("w8a8_linear", w8a8.apply(x, packed), expected)

    scale = scale[:, None].bfloat16()
    w8a16, w4a16 = CpuWeightOnlyLinear(8), CpuWeightOnlyLinear(4)
    packed = w8a16.pack({"weight": codes, "scale": scale})
    expected = x.double() @ (codes.double() * scale.double()).T
    _compare("w8a16_linear", w8a16.apply(x, packed), expected)
    # The low and the high half of a byte are two codes, offset by 8.
    two = codes[:, :36].view(torch.uint8)
    packed = w4a16.pack({"weight": two, "scale": scale})
    halves = torch.stack((two & 15, two >> 4), -1).flatten(-2)[:, :70].double() - 8
    _compare("w4a16_linear", w4a16.apply(x, packed), x.double() @ (halves * scale.double()).T)

    q, k, v = random(1, 2, 64), random(4, 1, 64), random(4, 1, 64)
    table, starts, lengths = (torch.tensor(values, dtype=torch.int32) for values in ([[1, 0]], [0, 1], [3]))
    out = paged_attention(q, k, v, table, starts, lengths, page_size=2, scale=0.125)
    keys = [2, 3, 0]  # slots of the three tokens: page 1, then page 0
    scores = q[0].double() @ k[keys, 0].double().T * 0.125
    _compare("paged_attention", out[0], scores.softmax(-1) @ v[keys, 0].double())


def _compare(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((got.double() - expected).norm() / expected.norm())
    if not error < 0.01:
        raise RuntimeError(f"CPU kernel {name} is wrong: relative error {error:.3g} (bound 0.01)")
