"""Routed experts by the CPU kernels: against float64, and the same bits for a token in any batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cpu_support import needs_cpu_kernels, randn, rel_error, threads
from torch import Tensor

from pymllm_core.builtin.torch_kernels import torch_route
from pymllm_core.nn.builder import Builder
from pymllm_core.nn.moe import OneByOne
from pymllm_core.nn.moe_ops import moe_experts, route
from pymllm_kernels.cpu_nodes import LinearNode

pytestmark = needs_cpu_kernels
EXPERTS, TOP_K, HIDDEN, WIDTH = 9, 3, 70, 34


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {"mlp.gate.weight": randn(generator, EXPERTS, HIDDEN, scale=0.3)}
    for index in range(EXPERTS):
        name = f"mlp.experts.{index}"
        for part in ("gate", "up"):
            found[f"{name}.{part}_proj.weight"] = randn(generator, WIDTH, HIDDEN, scale=0.2)
        found[f"{name}.down_proj.weight"] = randn(generator, HIDDEN, WIDTH, scale=0.2)
    return found


@pytest.fixture(scope="module")
def moe(tensors: dict[str, Tensor]) -> Any:
    def choose(operation: str, shape: Mapping[str, int]) -> Any:
        made = {"moe_route": torch_route, "moe_experts": OneByOne, "linear": LinearNode}[operation]
        return made()

    builder = Builder(dtype=torch.bfloat16, max_positions=8, kernel=choose)
    node = builder.moe(
        "mlp", hidden_size=HIDDEN, width=WIDTH, num_experts=EXPERTS, top_k=TOP_K, renormalise=True
    )
    for part in builder.nodes:
        part.load(lambda slot: tensors[slot.name], torch.device("cpu"))
    return node


@pytest.mark.parametrize("tokens", [1, 2, 13, 100])
def test_against_float64(moe: Any, tensors: dict[str, Tensor], tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, residual = randn(generator, tokens, HIDDEN), randn(generator, tokens, HIDDEN)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    each = [f"mlp.experts.{index}" for index in range(EXPERTS)]
    gate_up = torch.stack(
        [torch.cat([wide[f"{n}.gate_proj.weight"], wide[f"{n}.up_proj.weight"]]) for n in each]
    )
    down = torch.stack([wide[f"{name}.down_proj.weight"] for name in each])
    weights, ids = route(x.double() @ wide["mlp.gate.weight"].T, TOP_K, True)
    expected = moe_experts(x.double(), weights, ids, gate_up, down) + residual.double()
    # Rounded are the hidden row and the result, each to 2^-9.
    assert rel_error(moe(x, residual=residual), expected) < 3e-3


def test_a_token_has_the_same_bits_in_any_batch(moe: Any) -> None:
    x = randn(torch.Generator().manual_seed(7), 60, HIDDEN)
    with threads(1):
        alone = torch.cat([moe(row[None], residual=row[None]) for row in x])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(8))
    for count in (1, 2):
        with threads(count):
            assert torch.equal(moe(x, residual=x), alone)
            assert torch.equal(moe(x[order], residual=x[order]), alone[order])
            assert torch.equal(moe(x[:7], residual=x[:7]), alone[:7])
