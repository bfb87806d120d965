"""Configs and settings that no engine takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pymllm_core.testing.linting import change_config, check, only


def test_an_unknown_architecture_is_listed_by_its_modules(folder: Path) -> None:
    change_config(folder, architectures=["MambaForCausalLM"])
    report = check(folder)
    finding = only(report)
    assert finding.code == "architecture"
    assert "'MambaForCausalLM'" in finding.message
    assert "available: ToyForCausalLM" in finding.message
    assert ("model.layers.{0-1}.mlp.down_proj",) in [row.names for row in report.rows]
    down = next(row for row in report.rows if "down_proj" in row.names[0])
    assert down.format == "weight BF16 [32, 48]"
    assert report.totals.stored


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"architectures": []}, "architecture", "names no architecture"),
        ({"dtype": "float8"}, "dtype", "dtype 'float8' is not supported"),
        ({"num_attention_heads": ...}, "config", "config.json lacks the field 'num_attention_heads'"),
        ({"num_attention_heads": "x"}, "config", "ValueError: invalid literal"),
        (
            {"quantization_config": {"quant_method": "exotic"}},
            "quantisation",
            "method 'exotic' was asked for",
        ),
        ({"quantization_config": 3}, "quantisation", "quantization_config is no object"),
        ({"rope_scaling": {"type": "x"}, "rope_parameters": ...}, "graph", "rope type 'x' is not supported"),
    ],
)
def test_a_config_that_is_refused(folder: Path, fields: dict[str, Any], code: str, message: str) -> None:
    change_config(folder, **fields)
    finding = only(check(folder))
    assert (finding.severity, finding.code) == ("error", code)
    assert message in finding.message


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    finding = only(check(folder))
    assert finding.code == "bad-config"


def test_several_refusals_are_all_named(folder: Path) -> None:
    change_config(folder, architectures=["X"], dtype="float8", quantization_config={"quant_method": "exotic"})
    assert {finding.code for finding in check(folder).findings} == {"architecture", "dtype", "quantisation"}


def test_settings_count(folder: Path) -> None:
    finding = only(check(folder, kv_cache_dtype="fp8_e4m3"))
    assert finding.code == "kv-dtype"
    assert check(folder, dtype="float32").dtype == "float32"
    assert "--server.context_length 999" in only(check(folder, context_length=999)).message
