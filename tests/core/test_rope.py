"""Rotary tables against transformers, for every scaling and both forms of config.json."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pymllm_core.errors import CheckpointError
from pymllm_core.nn.ops import rotate
from pymllm_core.nn.rope import RopeConfig, rotary_table

CPU = torch.device("cpu")
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-betas": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.5,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


def config_of(name: str, head_dim: int, theta: float) -> dict[str, Any]:
    return {
        "hidden_size": head_dim * 2,
        "num_attention_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 2048,
        "rope_parameters": {**SCALINGS[name], "rope_theta": theta},
    }


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e6), (64, 1e4), (6, 500.0)])
def test_tables_equal_those_of_transformers(name: str, head_dim: int, theta: float) -> None:
    config = config_of(name, head_dim, theta)
    # Far out, the smallest difference of a frequency shows.
    count = 40_960
    table = rotary_table(RopeConfig.read(config, default_theta=1.0), head_dim, count, 2048, CPU)
    embedding = LlamaRotaryEmbedding(LlamaConfig(**config))
    cos, sin = embedding(torch.zeros(1, 1), torch.arange(count)[None])
    half = head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], atol=2e-6, rtol=0)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_both_forms_of_the_config_mean_the_same(name: str) -> None:
    new = config_of(name, 64, 1e5)
    for key in ("rope_type", "type"):
        scaling = {key if field == "rope_type" else field: value for field, value in SCALINGS[name].items()}
        old = {"rope_theta": 1e5, "rope_scaling": None if name == "default" else scaling}
        assert RopeConfig.read(old, default_theta=1.0) == RopeConfig.read(new, default_theta=1.0)


def test_theta_has_a_default() -> None:
    assert RopeConfig.read({}, default_theta=7.0) == RopeConfig(7.0, {})
    assert RopeConfig.read({"rope_theta": None, "rope_scaling": {}}, default_theta=7.0).theta == 7.0


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "su"])
def test_other_scalings_are_refused_by_name(kind: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"rope type '{kind}' is not supported; known: default, linear, llama3"
    ):
        RopeConfig.read({"rope_scaling": {"type": kind, "factor": 2.0}}, default_theta=1.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"rope_scaling": "yarn"},
        {"rope_scaling": ["yarn"]},
        {"rope_theta": "big"},
        {"rope_theta": -1.0},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": "two"}},
        {"rope_scaling": {"type": "linear", "factor": 0}},
        {"rope_scaling": {"type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "yarn", "factor": -4.0}},
    ],
)
def test_malformed_fields_are_refused_when_read(bad: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: .*rope"):
        RopeConfig.read(bad, default_theta=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_that_of_transformers(dtype: torch.dtype) -> None:
    q = torch.randn(9, 3, 16).to(dtype)
    table = rotary_table(RopeConfig(1e4, {}), 16, 64, 64, CPU)
    positions = torch.tensor([0, 1, 2, 5, 63, 7, 7, 30, 31])
    cos, sin = table[positions].chunk(2, dim=-1)
    doubled = [torch.cat((x, x), dim=-1)[None].to(dtype) for x in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], *doubled)
    torch.testing.assert_close(rotate(q, cos, sin), expected[0].transpose(0, 1), atol=0, rtol=0)
