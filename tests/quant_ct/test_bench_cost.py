"""Bytes and operations of a decode step in each format, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ct_files import group, inputs, weights

from pymllm_core.bench.cost import ModelCost
from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble
from pymllm_core.testing.engines import registry_of

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
# Rows and columns of a layer's products: q, k, v, o, gate, up, down.
PARTS = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
PRODUCTS = sum(rows * columns for rows, columns in PARTS)
ROWS = sum(rows for rows, _ in PARTS)
NORMS = 2 * (2 * (2 * 64 + 2 * 32) + 64)  # bytes: two of hidden and two of a head in each layer, a last one
HEAD = 300 * 64
KV = 2 * 2 * 32 * 2  # bytes a token: layers, K and V, one head of 32, bfloat16


@pytest.mark.parametrize(
    ("name", "found", "layer_bytes", "kind"),
    [
        ("bf16", None, 2 * PRODUCTS, "bfloat16"),
        # Half a byte a weight, and a scale of two bytes for each 32 of them.
        ("w4a16", group(weights(4, 32)), PRODUCTS / 2 + 2 * PRODUCTS / 32, "bfloat16"),
        # The zero points are packed, eight rows to a word.
        (
            "w4a16 asymmetric",
            group(weights(4, 32, symmetric=False)),
            PRODUCTS / 2 + 2 * PRODUCTS / 32 + PRODUCTS / 32 / 2,
            "bfloat16",
        ),
        ("w8a16", group(weights(8)), PRODUCTS + 2 * ROWS, "bfloat16"),
        ("w8a8", group(weights(8), inputs()), PRODUCTS + 2 * ROWS, "int8"),
    ],
)
def test_a_decode_step_by_hand(
    name: str, found: dict[str, Any] | None, layer_bytes: float, kind: str, tmp_path: Path
) -> None:
    quantised = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": found},
    }
    config = {**CONFIG, **({"quantization_config": quantised} if found else {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = Settings.of(str(tmp_path), device="cpu", dtype="bfloat16", load_format="dummy")
    registry = registry_of("pymllm_qwen3.plugin", "pymllm_quant_ct.plugin")
    work = ModelCost.of(assemble(settings, registry)).decode(4, 50)
    # The head is the embedding, in bfloat16; of the embedding itself each sequence reads one row.
    assert work.bytes == 2 * layer_bytes + NORMS + 2 * HEAD + 4 * 2 * 64 + 4 * 50 * KV
    attention = 4 * 2 * 2 * 50 * 2 * (32 + 32)  # sequences, layers, heads, tokens
    flops = {kind: 4 * 2 * 2 * PRODUCTS}
    flops["bfloat16"] = flops.get("bfloat16", 0) + 4 * 2 * HEAD + attention
    assert work.flops == flops
