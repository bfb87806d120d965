"""The plugin loads, and a quantised checkpoint is refused by name as long as nothing executes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pymllm_core.config import Settings
from pymllm_core.engine.build import make_plan
from pymllm_core.errors import CheckpointError
from pymllm_core.plugins import discover

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    },
}


def test_the_plugin_is_found_and_did_nothing_wrong() -> None:
    found = discover()
    assert "pymllm-quant-ct" in {plugin.name for plugin in found.distributions}
    assert not [failure for failure in found.failures if failure.distribution == "pymllm-quant-ct"]


def test_a_quantised_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"W4A16 group_size 32.*does not execute"):
        make_plan(Settings.of(str(tmp_path), load_format="dummy", device="cpu"))
