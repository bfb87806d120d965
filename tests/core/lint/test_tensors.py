"""Tensors that are missing, unused, misshapen or mistyped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_checkpoint import toy

from pymllm_core.errors import CheckpointError
from pymllm_core.testing.checkpoints import save, toy_model
from pymllm_core.testing.engines import make_engine
from pymllm_core.testing.linting import change_weights, check, only

DOWN = "model.layers.1.mlp.down_proj.weight"


def test_missing_unused_misshapen_and_mistyped_tensors(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors[DOWN] = torch.zeros(32, 47)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 48, dtype=torch.int8)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.float8_e4m3fn)
        tensors["model.layers.7.mlp.down_proj.weight"] = torch.zeros(1, dtype=torch.bfloat16)

    change_weights(folder, change)
    report = check(folder)
    assert {(finding.code, finding.where, finding.message) for finding in report.findings} == {
        ("missing-tensor", ("model.norm.weight",), "the model reads them, and no file holds them"),
        ("wrong-shape", (DOWN,), "stored as [32, 47], expected [32, 48]"),
        (
            "wrong-dtype",
            ("model.layers.0.mlp.down_proj.weight",),
            "stored as I8, expected bfloat16",
        ),
        ("wrong-dtype", ("model.layers.0.mlp.up_proj.weight",), "stored as F8_E4M3, expected bfloat16"),
        (
            "unused-tensor",
            ("model.layers.7.mlp.down_proj.weight",),
            "stored, and nothing in the model reads them; loading refuses what it does not understand",
        ),
        ("wide-weights", (DOWN,), "stored as F32, computed in bfloat16"),
    }
    assert report.count("error") == 5


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_what_is_mistyped_for_lint_is_refused_by_loading(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda tensors: tensors.update({DOWN: torch.zeros(32, 48).to(dtype)}))
    assert only(check(folder)).code == "wrong-dtype"
    with pytest.raises(CheckpointError, match=f"tensor '{DOWN}' of .* is {dtype}"):
        make_engine(folder)


def test_a_copy_of_a_tied_head(tmp_path: Path) -> None:
    folder = toy(tmp_path / "tied", tie_word_embeddings=True)
    change_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(300, 32, dtype=torch.bfloat16)})
    )
    finding = only(check(folder))
    assert (finding.severity, finding.code, finding.where) == ("note", "tied-head-copy", ("lm_head.weight",))
    assert finding.message == "stored (18.8 KiB), and not read: the head is tied to the embedding"


def test_float32_weights_are_noted(tmp_path: Path) -> None:
    save(toy_model(), tmp_path, architectures=["ToyForCausalLM"], model_type="toy")
    finding = only(check(tmp_path))
    assert (finding.severity, finding.code) == ("note", "wide-weights")
    assert finding.message == "stored as F32, computed in float32"
    assert len(finding.where) == 2 * 7 + 2
