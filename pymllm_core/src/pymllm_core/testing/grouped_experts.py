"""A plugin whose kernels serve all experts of a layer from stacked tensors, in plain torch, on any device.

It goes the way of a grouped GPU kernel (loading into stacks, `protocols.kernel.ExpertsKernel`), so that this way
is tested where there is no GPU, and it says what the operations of experts mean in every format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm_core.builtin.torch_kernels import TorchLinear
from pymllm_core.builtin.torch_quant import TorchW4A16, TorchW8A8, TorchW8A16
from pymllm_core.hookspecs import hookimpl
from pymllm_core.nn.ops import silu_mul
from pymllm_core.protocols.kernel import LinearKernel
from pymllm_core.specs import KernelSpec

CONTRACT = "1.0"
Stack = tuple[dict[str, Tensor], dict[str, Tensor]]


@hookimpl
def pymllm_kernels() -> list[KernelSpec]:
    return [
        KernelSpec(operation=operation, name="grouped", implementation=f"{__name__}:{make}", priority=1000)
        for operation, make in (
            ("moe_experts", "dense"),
            ("w4a16_moe_experts", "w4a16"),
            ("w8a16_moe_experts", "w8a16"),
            ("w8a8_moe_experts", "w8a8"),
        )
    ]


class GroupedExperts:
    """`protocols.kernel.ExpertsKernel` by the kernel of one linear, which takes an expert's part of the stack."""

    graph_safe = True

    def __init__(self, linear: LinearKernel) -> None:
        self._linear = linear

    def pack(self, gate_up: dict[str, Tensor], down: dict[str, Tensor]) -> Stack:
        return gate_up, down

    def apply(
        self, x: Tensor, weights: Tensor, ids: Tensor, packed: Stack, *, residual: Tensor | None = None
    ) -> Tensor:
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(packed[0]["weight"].shape[0]):
            chosen = ids == expert
            y = x
            for tensors, act in zip(packed, (silu_mul, None), strict=True):
                mine = {name: tensor[expert] for name, tensor in tensors.items()}
                y = self._linear.apply(y, self._linear.pack(mine, act=None))
                y = y if act is None else act(y)
            share = torch.where(chosen, weights, 0.0).sum(-1, keepdim=True)
            total += torch.where(chosen.any(-1, keepdim=True), y.float() * share, 0.0)
        return (total if residual is None else total + residual).to(x.dtype)


def dense() -> GroupedExperts:
    return GroupedExperts(TorchLinear())


def w4a16() -> GroupedExperts:
    return GroupedExperts(TorchW4A16())


def w8a16() -> GroupedExperts:
    return GroupedExperts(TorchW8A16())


def w8a8() -> GroupedExperts:
    return GroupedExperts(TorchW8A8())
