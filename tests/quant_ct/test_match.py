"""Which modules a config means, and what happens where fused parts are meant differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ct_files import group, inputs, weights

from pymllm_core.protocols.quant import LinearLayer, LinearPart
from pymllm_quant_ct.config import read_config
from pymllm_quant_ct.match import Matcher
from pymllm_quant_ct.method import CompressedTensors

Q = "model.layers.0.self_attn.q_proj"
VISUAL = "model.visual.blocks.0.attn.qkv"


def matcher(*targets: tuple[str, ...], ignore: tuple[str, ...] = ()) -> Matcher:
    groups = {f"g{i}": group(weights(8), None, *names) for i, names in enumerate(targets)}
    return Matcher(read_config({"config_groups": groups, "ignore": list(ignore)}))


def found(match: Matcher, name: str, module: str = "Linear") -> str | None:
    chosen = match.group(name, module)
    return chosen and chosen.field.removeprefix("config_groups.")


@pytest.mark.parametrize(
    ("targets", "ignore", "name", "expected"),
    [
        ([("Linear",)], (), Q, "g0"),
        ([("LinearBase",)], (), Q, "g0"),
        ([("Embedding",)], (), Q, None),
        ([("Linear",)], (Q,), Q, None),
        ([("Linear",)], ("model.layers.0.self_attn",), Q, "g0"),  # a name is no prefix
        ([("Linear",)], ("re:model.layers.0",), Q, None),  # a regular expression is matched from the start
        ([("Linear",)], ("re:self_attn",), Q, "g0"),
        ([("re:.*mlp.gate",)], (), "model.layers.0.mlp.gate_proj", "g0"),  # but not to the end
        ([("Linear",), ("re:.*q_proj",), (Q,)], (), Q, "g2"),
        ([("Linear",), ("re:.*q_proj",)], (), Q, "g1"),
        ([("re:.*q_proj",), ("re:.*self_attn.*",)], (), Q, "g0"),
        # Qwen3-VL, in either naming.
        ([("Linear",)], ("visual.blocks.0.attn.qkv",), VISUAL, None),
        ([("Linear",)], ("re:visual.*",), VISUAL, None),
        ([("Linear",)], ("re:model.visual.*",), "visual.blocks.0.attn.qkv", None),
        ([("Linear",)], ("language_model.model.layers.0.mlp.up_proj",),
         "model.language_model.layers.0.mlp.up_proj", None),
        ([("model.language_model.layers.0.mlp.up_proj",)], (),
         "language_model.model.layers.0.mlp.up_proj", "g0"),
    ],
)  # fmt: skip
def test_rules(
    targets: list[tuple[str, ...]], ignore: tuple[str, ...], name: str, expected: str | None
) -> None:
    assert found(matcher(*targets, ignore=ignore), name) == expected


def method(*groups: dict[str, Any], ignore: tuple[str, ...] = ()) -> CompressedTensors:
    named = {f"g{i}": g for i, g in enumerate(groups)}
    return CompressedTensors({"config_groups": named, "ignore": list(ignore)})


QKV = LinearLayer(tuple(LinearPart(f"a.{name}_proj", 64) for name in "qkv"), 64)


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        (method(group(weights(4, 32))), True),
        (method(group(weights(4, 32)), ignore=("re:.*k_proj",)), False),
        (method(group(weights(4, 32)), ignore=("re:.*",)), True),
        (method(group(weights(4, 32), None, "re:.*q_proj"), group(weights(4, 32), None, "re:.*")), True),
        (method(group(weights(4, 32), None, "re:.*q_proj"), group(weights(4, 64), None, "re:.*")), False),
        (method(group(weights(8), None, "re:.*q_proj"), group(weights(8), inputs(), "re:.*")), False),
        (method(group(weights(4, 32, actorder="static"))), True),
        (method(group(weights(4, 32, actorder="group"))), False),
    ],
)
def test_parts_that_are_stored_alike_are_fused(quant: CompressedTensors, expected: bool) -> None:
    assert quant.fuses(QKV, None) is expected


def test_what_is_stored_plainly_is_read_plainly() -> None:
    """Whatever the config says: ignored names move between versions of transformers."""
    quant = method(group(weights(4, 32)))
    stored = {f"{part.name}.weight": (64, 64) for part in QKV.parts}
    assert quant.linear(QKV, torch.bfloat16, stored) is None
    assert quant.fuses(QKV, stored)
    stored = {**stored, "a.v_proj.weight_scale": (64, 2)}
    assert not quant.fuses(QKV, stored)
