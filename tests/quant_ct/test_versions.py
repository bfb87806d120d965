"""Files written by several versions of compressed-tensors load, and dequantise to what the package says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ct_files import loaded_weights
from make_fixtures import digest

from pymllm_core.testing.engines import complete, greedy, make_engine

PLUGINS = ("pymllm_qwen3.plugin", "pymllm_quant_ct.plugin")
FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_weights_of_a_version(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    found = {f"{name}.weight": digest(weight) for name, weight in loaded_weights(folder).items()}
    assert found == expected


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_a_version_runs(folder: Path) -> None:
    (answer,) = complete(make_engine(folder, *PLUGINS), [[1, 2, 3]], greedy(2))
    assert len(answer.token_ids) == 2


def test_versions() -> None:
    versions = {folder.name.partition("-")[0] for folder in FIXTURES}
    assert versions == {"0.9.4", "0.12.2", "0.20.0"}
    assert any(folder.name.endswith("g-idx") for folder in FIXTURES)
