"""What `pymllm lint-checkpoint` says of architectures that nobody implements, from the names of tensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ct_files import group, weights
from safetensors.torch import save_file
from test_models import PLUGINS
from torch import Tensor

from pymllm_core.testing.linting import check, only


def module(name: str, rows: int, columns: int, size: int | None = 32) -> dict[str, Tensor]:
    """A quantised module as pack-quantized stores it, its scales rounded up to whole groups."""
    groups = 1 if size is None else -(-columns // size)
    return {
        f"{name}.weight_packed": torch.zeros(rows, -(-columns // 8), dtype=torch.int32),
        f"{name}.weight_scale": torch.ones(rows, groups, dtype=torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }


def plain(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.zeros(rows, columns, dtype=torch.bfloat16)}


def write_unknown(folder: Path, ignore: list[str], *stored: dict[str, Tensor], **fields: Any) -> None:
    """A checkpoint of an architecture that no plugin has."""
    groups = {"group_0": group(weights(4, 32, **fields))}
    config = {
        "architectures": ["Qwen3UnknownForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        | {"config_groups": groups, "ignore": ignore},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor for each in stored for name, tensor in each.items()}, folder / "model.safetensors"
    )


EXPERTS = [module(f"model.layers.{i}.mlp.experts.{e}.up_proj", 64, 96) for i in range(2) for e in range(4)]
ROUTERS = tuple(f"model.layers.{i}.mlp.gate" for i in range(2))
FC = "model.visual.blocks.0.mlp.linear_fc1"


def test_a_mixture_that_is_right(tmp_path: Path) -> None:
    routers = [plain(name, 4, 64) for name in ROUTERS]
    write_unknown(tmp_path, ["lm_head", "re:.*mlp.gate$"], *EXPERTS, *routers)
    report = check(tmp_path, *PLUGINS)
    assert only(report).code == "architecture"
    assert report.rows[0].names == ("model.layers.{0-1}.mlp.experts.{0-3}.up_proj",)


def test_a_router_that_is_quantised(tmp_path: Path) -> None:
    write_unknown(tmp_path, ["lm_head"], *EXPERTS, *(module(name, 4, 64) for name in ROUTERS))
    found = only(check(tmp_path, *PLUGINS), "warning")
    assert (found.code, found.where) == ("router-quantised", ROUTERS)


def test_a_router_that_ignore_forgot(tmp_path: Path) -> None:
    """Not quantised in the files: other engines build it quantised and load zeros (compressed-tensors#733)."""
    write_unknown(tmp_path, ["lm_head"], *EXPERTS, *(plain(name, 4, 64) for name in ROUTERS))
    found = only(check(tmp_path, *PLUGINS), "note")
    assert (found.code, found.where) == ("targeted-but-plain", ROUTERS)


@pytest.mark.parametrize("entry", ["visual.blocks.0.mlp.linear_fc1", "re:visual.*"])
def test_a_tower_that_ignore_missed(tmp_path: Path, entry: str) -> None:
    """llm-compressor#1766: `ignore` has the old names, so the tower was quantised."""
    write_unknown(tmp_path / "quantised", [entry], module(FC, 64, 64))
    found = [f for f in check(tmp_path / "quantised", *PLUGINS).findings if f.code != "architecture"]
    assert [(f.severity, f.code, f.where) for f in found] == [("error", "ignored-by-other-name", (FC,))]
    assert repr(entry) in found[0].message
    write_unknown(tmp_path / "plain", [entry], plain(FC, 64, 64))
    found = [f for f in check(tmp_path / "plain", *PLUGINS).findings if f.code != "architecture"]
    severities = {(f.severity, f.code) for f in found}
    assert ("note", "ignored-by-other-name") in severities
    assert "error" not in {f.severity for f in found}


def test_a_tower_that_is_quantised_without_ignore(tmp_path: Path) -> None:
    write_unknown(tmp_path, ["lm_head"], module(FC, 64, 64))
    found = only(check(tmp_path, *PLUGINS), "warning")
    assert (found.code, found.where) == ("visual-quantised", (FC,))


def test_columns_that_the_group_does_not_divide(tmp_path: Path) -> None:
    """As the vision MLP of Qwen3-VL-8B, 4304 columns wide."""
    write_unknown(tmp_path, [], module("model.proj", 8, 4304), module("model.other", 8, 4288))
    (found,) = [f for f in check(tmp_path, *PLUGINS).findings if f.code != "architecture"]
    assert (found.severity, found.code, found.where) == ("error", "group-does-not-divide", ("model.proj",))
    assert found.message.startswith("4304 columns are no multiple of group_size 32")


@pytest.mark.parametrize(
    ("changes", "fields", "code", "message"),
    [
        ({"weight_scale": torch.ones(8, 3)}, {}, "wrong-shape", "stored as [8, 3], expected [8, 2]"),
        ({"weight_scale": torch.ones(7, 2)}, {}, "wrong-shape", "stored as [7, 2], expected [8, 2]"),
        ({"weight_packed": torch.zeros(8, 8)}, {}, "wrong-dtype", "stored as F32, expected I32"),
        ({"weight_packed": None}, {}, "scale-without-weight", "weight_scale, weight_shape: stored, but"),
        ({"weight_scale": None}, {}, "weight-without-scale", "without weight_scale"),
        ({}, {"symmetric": False}, "missing-tensor", "weights.symmetric is false"),
        (
            {},
            {"strategy": "channel", "group_size": None},
            "wrong-shape",
            "stored as [8, 2], expected [8, 1]",
        ),
    ],
)
def test_tensors_of_one_module(
    changes: dict[str, Tensor | None], fields: dict[str, Any], code: str, message: str, tmp_path: Path
) -> None:
    stored = module("model.proj", 8, 64)
    for kind, value in changes.items():
        stored.pop(f"model.proj.{kind}")
        if value is not None:
            stored[f"model.proj.{kind}"] = value
    write_unknown(tmp_path, [], stored, **fields)
    (found,) = [f for f in check(tmp_path, *PLUGINS).findings if f.code != "architecture"]
    assert (found.severity, found.code) == ("error", code)
    assert message in found.message


def test_fused_experts(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj_packed"
    write_unknown(tmp_path, [], {name: torch.zeros(2, 8, 8, dtype=torch.int32)}, module("model.proj", 8, 64))
    found = only(check(tmp_path, *PLUGINS), "warning")
    assert (found.code, found.where) == ("fused-experts", (name,))
