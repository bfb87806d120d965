"""compressed-tensors configs: registered, selected by the checkpoint, refused by name."""

from __future__ import annotations

import pytest

from pymllm_core.errors import CheckpointError
from pymllm_quant_ct.config import describe

W4A16 = {
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}},
}
W8A8 = {
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "dynamic": True},
        }
    },
}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (W4A16, "pack-quantized: group_0 W4A16 group_size 128"),
        (W8A8, "int-quantized: group_0 W8A8"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "no format: W4A16 preset for Linear"),
    ],
)
def test_describe_names_the_scheme(config: dict[str, object], text: str) -> None:
    assert describe(config) == text


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "config_groups"),
        ({"config_groups": {"g": {}}}, "config_groups.g.weights"),
        (
            {"config_groups": {"g": {"weights": {}, "input_activations": 3}}},
            "config_groups.g.input_activations",
        ),
    ],
)
def test_a_malformed_config_names_its_field(config: dict[str, object], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        describe(config)
