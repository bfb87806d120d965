"""Files that do not hold what their config says are refused; heads are decided by what is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ct_files import group, inputs, weights, write
from test_models import PLUGINS, compute
from torch import Tensor

from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble
from pymllm_core.errors import CheckpointError
from pymllm_core.nn.split_linear import SplitLinear
from pymllm_core.testing.engines import make_engine, registry_of

OUT = "model.layers.1.self_attn.o_proj"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(name: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_(name: str, value: Tensor) -> Change:
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{OUT}.weight_packed"), rf"missing: {OUT}.weight_packed"),
        (without(f"{OUT}.weight_scale"), rf"missing: {OUT}.weight_scale"),
        (without(f"{OUT}.weight_zero_point"), rf"missing: {OUT}.weight_zero_point"),
        (with_(f"{OUT}.weight_packed", torch.zeros(64, 7, dtype=torch.int32)), rf"{OUT}.weight_packed is \[64, 7\]"),
        (with_(f"{OUT}.weight_packed", torch.zeros(64, 8, dtype=torch.int64)), r"weight_packed' of .* is torch.int64"),
        (with_(f"{OUT}.weight_scale", torch.ones(64, 3)), rf"{OUT}.weight_scale is \[64, 3\]"),
        (with_(f"{OUT}.weight_scale", torch.ones(64, 2, dtype=torch.int32)), rf"{OUT}.weight_scale"),
        (with_(f"{OUT}.weight_shape", torch.tensor([64, 65])), rf"{OUT}.weight_shape holds \[64, 65\]"),
        (with_(f"{OUT}.weight_g_idx", torch.zeros(64, dtype=torch.int32)), rf"not used by the model: {OUT}.weight_g"),
        (with_("model.layers.0.self_attn.k_scale", torch.ones(1)), "not used by the model: .*k_scale"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(change: Change, message: str, tmp_path: Path) -> None:
    write(tmp_path, [group(weights(4, 32, symmetric=False))], change=change)
    with pytest.raises(CheckpointError, match=message):
        make_engine(tmp_path, *PLUGINS)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_static_scale_must_be_positive(value: float, tmp_path: Path) -> None:
    change = with_(f"{OUT}.input_scale", torch.tensor([value]))
    write(tmp_path, [group(weights(8), inputs(dynamic=False))], change=change)
    with pytest.raises(CheckpointError, match=rf"{OUT}.input_scale"):
        make_engine(tmp_path, *PLUGINS)


def test_zero_points_of_symmetric_weights_must_be_zero(tmp_path: Path) -> None:
    name = f"{OUT}.weight_zero_point"
    zeros = torch.zeros(64, 1, dtype=torch.int8)
    write(tmp_path / "zero", [group(weights(8), inputs())], change=with_(name, zeros))
    make_engine(tmp_path / "zero", *PLUGINS)
    write(tmp_path / "one", [group(weights(8), inputs())], change=with_(name, zeros + 1))
    with pytest.raises(CheckpointError, match=name):
        make_engine(tmp_path / "one", *PLUGINS)


def test_unpacked_zero_points_of_old_versions(tmp_path: Path) -> None:
    """Before 0.9.4 they were stored as int8 [N, G]."""
    from pymllm_quant_ct.packing import unpack_rows

    def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in list(tensors.items()):
            if name.endswith("zero_point"):
                rows = tensors[name.replace("zero_point", "scale")].shape[0]
                tensors[name] = unpack_rows(tensor, 4, rows)
        return tensors

    groups = [group(weights(4, 32, symmetric=False))]
    write(tmp_path / "new", groups)
    write(tmp_path / "old", groups, change=unpacked)
    assert torch.equal(compute(tmp_path / "new"), compute(tmp_path / "old"))


def test_static_scales_of_fused_parts_are_merged(tmp_path: Path) -> None:
    """To the range that holds them all."""
    q = "model.layers.0.self_attn.q_proj"
    change = with_(f"{q}.input_scale", torch.tensor([0.5]))
    write(tmp_path, [group(weights(8), inputs(dynamic=False))], change=change)
    settings = Settings.of(str(tmp_path), device="cpu", dtype="float32")
    assembly = assemble(settings, registry_of(*PLUGINS))
    qkv = assembly.model.layers[0].qkv  # type: ignore[attr-defined]
    from pymllm_core.engine.checkpoint import Checkpoint

    tensors = qkv.scheme.load(Checkpoint(tmp_path).read, torch.device("cpu"))
    assert float(tensors["input_scale"]) == 0.5


def test_a_missing_head_is_tied(tmp_path: Path) -> None:
    """The package saves no head of a tied model; its config.json may say otherwise by default."""
    groups = [group(weights(4, 32))]
    write(tmp_path / "tied", groups)
    write(tmp_path / "untied", groups)
    config = tmp_path / "untied" / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    assert torch.equal(compute(tmp_path / "tied"), compute(tmp_path / "untied"))


def test_parts_that_disagree_run_apart(tmp_path: Path) -> None:
    write(tmp_path, [group(weights(4, 32))], ignore=("lm_head", "re:.*0.*v_proj"))
    settings = Settings.of(str(tmp_path), device="cpu", dtype="float32")
    first, second = assemble(settings, registry_of(*PLUGINS)).model.layers  # type: ignore[attr-defined]
    assert isinstance(first.qkv, SplitLinear)
    assert [part.scheme.name for part in first.qkv.parts] == ["W4A16", "W4A16", "dense"]
    assert not isinstance(second.qkv, SplitLinear)
