"""Files written by several versions of compressed-tensors load, and dequantise to what the package says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_fixtures import digest

from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble
from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.nn.linear import Linear
from pymllm_core.nn.quant_ops import dequantize, unpack_int4
from pymllm_core.nn.split_linear import SplitLinear
from pymllm_core.testing.engines import complete, greedy, make_engine, registry_of

PLUGINS = ("pymllm_qwen3.plugin", "pymllm_quant_ct.plugin")
FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_weights_of_a_version(folder: Path) -> None:
    settings = Settings.of(str(folder), device="cpu", dtype="bfloat16")
    builder = assemble(settings, registry_of(*PLUGINS)).builder
    checkpoint = Checkpoint(folder)
    expected = json.loads((folder / "expected.json").read_text())
    found = {}
    for node in builder.nodes:
        parts = node.parts if isinstance(node, SplitLinear) else [node]
        for linear in parts:
            if not isinstance(linear, Linear) or linear.scheme.name == "dense":
                continue
            tensors = linear.scheme.load(checkpoint.read, torch.device("cpu"))
            codes = tensors["weight"]
            if linear.scheme.operation == "w4a16_linear":
                codes = unpack_int4(codes, linear.layer.in_features)
            scale = tensors["scale"] if "scale" in tensors else tensors["weight_scale"][:, None]
            weight = dequantize(codes, scale, tensors.get("zero_point"), tensors.get("g_idx"))
            rows = [part.out_features for part in linear.layer.parts]
            for part, piece in zip(linear.layer.parts, weight.split(rows), strict=True):
                found[f"{part.name}.weight"] = digest(piece)
    assert found == expected


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_a_version_runs(folder: Path) -> None:
    (answer,) = complete(make_engine(folder, *PLUGINS), [[1, 2, 3]], greedy(2))
    assert len(answer.token_ids) == 2


def test_versions() -> None:
    versions = {folder.name.partition("-")[0] for folder in FIXTURES}
    assert versions == {"0.9.4", "0.12.2", "0.20.0"}
    assert any(folder.name.endswith("g-idx") for folder in FIXTURES)
