"""Quantised experts: tiny models written by compressed-tensors, against their dequantised weights in float64.

transformers 5 keeps all experts of a layer in one tensor, which the package does not quantise. Checkpoints hold
an expert as three Linears, as transformers 4 had them, so that here the layer has them, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ct_files import TINY, group, inputs, weights, write
from test_models import BFLOAT16, FLOAT32, FLOAT32_W8A8, PLUGINS, compute, expect
from torch import Tensor, nn

from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble
from pymllm_core.errors import CheckpointError
from pymllm_core.testing.engines import complete, greedy, make_engine, registry_of

MOE: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}
GROUPED = "pymllm_core.testing.grouped_experts"
EXPERTS, ATTENTION = "re:.*mlp.experts.*_proj$", "re:.*self_attn.*_proj$"


class Expert(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Experts(nn.ModuleList):
    """Called as transformers calls its own experts."""

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for index, expert in enumerate(self):
            token, place = torch.where(ids == index)
            if len(token):
                total.index_add_(0, token, expert(x[token]) * scores[token, place, None])
        return total


class LinearRouter(nn.Linear):
    """The router as transformers 4 had it, a Linear that the package may quantise."""

    top_k = 2

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        values, ids = logits.softmax(-1, dtype=torch.float).topk(self.top_k, dim=-1)
        return logits, (values / values.sum(-1, keepdim=True)).to(logits.dtype), ids


def routed(fields: Mapping[str, Any]) -> Any:
    """A tiny Qwen3Moe whose experts are Linears; field `linear_router`: so is the router."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields = {**TINY, **MOE, **fields}
    linear_router = fields.pop("linear_router", False)
    config = Qwen3MoeConfig(**fields)
    model = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            each = (
                Expert(config.hidden_size, config.moe_intermediate_size) for _ in range(MOE["num_experts"])
            )
            layer.mlp.experts = Experts(each)
            if linear_router:
                layer.mlp.gate = LinearRouter(config.hidden_size, MOE["num_experts"], bias=False)
    return model


W4, W8, W8A8 = group(weights(4, 32)), group(weights(8)), group(weights(8), inputs())
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "w4 g32": ([W4], {}, "w4a16_moe_experts"),
    "w4 g32 asymmetric": ([group(weights(4, 32, symmetric=False))], {}, "w4a16_moe_experts"),
    "w4 channel": ([group(weights(4))], {}, "w4a16_moe_experts"),
    "w8": ([W8], {}, "w8a16_moe_experts"),
    "some layers dense": ([W4], {"mlp_only_layers": [0]}, "w4a16_moe_experts"),
    "experts alone": ([group(weights(4, 32), None, EXPERTS)], {}, "w4a16_moe_experts"),
    "not the experts": ([group(weights(4, 32), None, ATTENTION)], {}, "moe_experts"),
    "down unlike": (
        [group(weights(8), None, "re:.*down_proj"), group(weights(4, 32), None, "re:.*(gate|up)_proj")],
        {},
        "mixed_moe_experts",
    ),
    "an expert ignored": ([W4], {"ignore": ("lm_head", "re:.*experts.3.*")}, "mixed_moe_experts"),
    "up ignored": ([W8], {"ignore": ("lm_head", "re:.*up_proj")}, "mixed_moe_experts"),
    "router quantised": ([W8], {"linear_router": True}, "w8a16_moe_experts"),
    "router ignored": (
        [W8],
        {"linear_router": True, "ignore": ("lm_head", "re:.*mlp.gate$")},
        "w8a16_moe_experts",
    ),
    "w8a8": ([W8A8], {}, "w8a8_moe_experts"),
    "w8a8 static": ([group(weights(8), inputs(dynamic=False))], {}, "w8a8_moe_experts"),
    "w8a8 asymmetric": ([group(weights(8), inputs(symmetric=False))], {}, "w8a8_moe_experts"),
}


@pytest.mark.parametrize("case", CASES)
def test_quantised_experts_float32(case: str, tmp_path: Path) -> None:
    groups, fields, operation = CASES[case]
    reference = write(tmp_path, groups, dtype=torch.float32, build=routed, **fields)
    bound = FLOAT32_W8A8 if groups[0]["input_activations"] else FLOAT32
    expected = expect(reference, groups, tmp_path)
    settings = Settings.of(str(tmp_path), device="cpu", dtype="float32")
    mixed = operation == "mixed_moe_experts"
    for plugins, name in (
        (PLUGINS, "one-by-one"),
        ((*PLUGINS, GROUPED), "one-by-one" if mixed else "grouped"),
    ):
        assert (compute(tmp_path, plugins=plugins) - expected).abs().max() < bound
        kernels = assemble(settings, registry_of(*plugins)).plan.kernels
        chosen = {label.split(" ")[0]: choice.spec.name for label, choice in kernels.items()}
        assert {key: value for key, value in chosen.items() if "experts" in key} == {operation: name}


@pytest.mark.parametrize(("case", "bound"), [("w4 g32", BFLOAT16), ("w8", BFLOAT16), ("w8a8", 3 * BFLOAT16)])
def test_quantised_experts_bfloat16(case: str, bound: float, tmp_path: Path) -> None:
    """With the CPU's own kernels. All experts are chosen, since rounding moves a choice that is close.

    Where activations are quantised, rounding to bfloat16 (2^-9) also moves some by a whole code (2^-8 of the
    largest).
    """
    groups, fields, _ = CASES[case]
    fields = {**fields, "num_experts_per_tok": MOE["num_experts"]}
    expected = expect(write(tmp_path, groups, build=routed, **fields), groups, tmp_path)
    found = compute(tmp_path, dtype="bfloat16")
    assert (found - expected).norm() / expected.norm() < bound


def test_a_router_is_quantised_only_where_it_is_stored_so(tmp_path: Path) -> None:
    """A config that targets every Linear says nothing of the router, which is none in transformers 5."""
    write(tmp_path, [W8], build=routed)
    engine = make_engine(tmp_path, *PLUGINS, load_format="dummy")
    assert f"linear K={TINY['hidden_size']} N={MOE['num_experts']}" in engine.plan.kernels
    assert len(complete(engine, [[5, 6, 7]], greedy(3))[0].token_ids) == 3


def test_a_missing_scale_of_an_expert_is_named(tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors.pop("model.layers.1.mlp.experts.2.down_proj.weight_scale")
        return tensors

    write(tmp_path, [W4], build=routed, change=without)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.down_proj\.weight_scale"):
        make_engine(tmp_path, *PLUGINS)
