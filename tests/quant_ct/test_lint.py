"""What `pymllm lint-checkpoint` says of compressed-tensors checkpoints, each trouble provoked in one of its own.

That a finding is right is held against loading: an error is raised there, too, and what has none loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ct_files import group, inputs, weights, write
from test_loading import with_, without
from test_models import EVERYTHING, PLUGINS, W8A8, WEIGHT_ONLY
from test_versions import FIXTURES
from torch import Tensor

from pymllm_core.engine.engine import Engine
from pymllm_core.errors import CheckpointError
from pymllm_core.nn.linear import Linear
from pymllm_core.nn.split_linear import SplitLinear
from pymllm_core.protocols.lint import Finding
from pymllm_core.testing.engines import make_engine
from pymllm_core.testing.linting import change_config, check, only

W4 = [group(weights(4, 32))]
AVX2 = {"avx2", "avx512_vnni", "avx512_bf16"}  # so that findings about kernels are the same everywhere
OUT, DOWN = "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"
KV = "model.layers.0.self_attn"


def mend(folder: Path, **fields: Any) -> None:
    """Change fields of the quantization_config."""
    path = folder / "config.json"
    quantization = json.loads(path.read_text())["quantization_config"]
    change_config(folder, quantization_config={**quantization, **fields})


def codes(folder: Path, severity: str = "error") -> dict[str, Finding]:
    """The findings of one severity by their code."""
    found = [f for f in check(folder, *PLUGINS, cpu=AVX2).findings if f.severity == severity]
    assert len({finding.code for finding in found}) == len(found), found
    return {finding.code: finding for finding in found}


def refused(folder: Path) -> None:
    """Loading refuses the checkpoint, too."""
    with pytest.raises(CheckpointError):
        make_engine(folder, *PLUGINS)


def linears(engine: Engine) -> list[Linear]:
    """Every linear that runs."""
    model: Any = engine._runner._model
    nodes = [n for layer in model.layers for n in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    parts = [part for node in nodes for part in (node.parts if isinstance(node, SplitLinear) else [node])]
    return [*parts, model.head]


# -- what is good -------------------------------------------------------------------------------------

# What these cases are about is itself worth a note.
NOTED = {
    "w4 actorder": set(),
    "part ignored": {"unfused"},
    "parts unlike": {"unfused"},
    "w4 g32": set(),
}


@pytest.mark.parametrize("case", [*WEIGHT_ONLY, *W8A8])
def test_what_loads_has_no_errors(case: str, tmp_path: Path) -> None:
    groups, fields = {**WEIGHT_ONLY, **W8A8}[case]
    write(tmp_path, groups, **fields)
    report = check(tmp_path, *PLUGINS, dtype="bfloat16", cpu=AVX2)
    assert not [f for f in report.findings if f.severity != "note"]
    if case in NOTED:
        assert {finding.code for finding in report.findings} == NOTED[case]


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_files_of_all_versions_have_no_errors(folder: Path) -> None:
    report = check(folder, *PLUGINS)
    assert not [f for f in report.findings if f.severity != "note"]
    assert ("g-idx" in {f.code for f in report.findings}) == folder.name.endswith("g-idx")


@pytest.mark.parametrize("case", ["w4 g32", "w4 channel asymmetric", "w8 channel", "part ignored", "lm_head"])
def test_kernels_are_those_that_an_engine_uses(case: str, tmp_path: Path) -> None:
    groups, fields = WEIGHT_ONLY[case]
    write(tmp_path, groups, **fields)
    engine = make_engine(tmp_path, *PLUGINS, dtype="bfloat16")
    report = check(tmp_path, *PLUGINS, dtype="bfloat16")
    by_class = {
        r.spec.key: (r.spec.operation, r.spec.implementation.partition(":")[2])
        for r in engine.plan.kernels.values()
    }
    listed = sorted(
        (*by_class[f"{row.operation}/{row.kernel.partition(' ')[0]}"], row.rows, row.columns)
        for row in report.rows
        for _ in range(row.count)
        if row.kernel is not None and row.operation != "attention_prep"
    )
    used = sorted(
        (n.scheme.operation, type(n.kernel).__name__, n.layer.out_features, n.layer.in_features)
        for n in linears(engine)
    )
    assert listed == used


def test_bytes_by_format(tmp_path: Path) -> None:
    """4-bit codes are half a byte, and each group of 32 has a scale of two."""
    write(tmp_path, W4)
    totals = check(tmp_path, *PLUGINS).totals
    rows = 2 * (64 + 32 + 32 + 96 + 96)  # q, k, v, gate, up of 64 columns
    quantised = rows * (32 + 2 * 2) + 2 * 64 * (32 + 2 * 2) + 2 * 64 * (48 + 3 * 2)
    assert totals.weights["W4A16 g32 sym"] == quantised
    assert totals.weights["bfloat16"] == 64 * 64 * 2


# -- config against files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "where"),
    [
        (without(f"{OUT}.weight_packed"), "scale-without-weight", OUT),
        (without(f"{OUT}.weight_scale"), "weight-without-scale", OUT),
        (without(f"{OUT}.weight_zero_point"), "missing-tensor", f"{OUT}.weight_zero_point"),
        (with_(f"{OUT}.weight_packed", torch.zeros(64, 7, dtype=torch.int32)), "wrong-shape", f"{OUT}.weight_packed"),
        (with_(f"{OUT}.weight_packed", torch.zeros(64, 8, dtype=torch.int64)), "wrong-dtype", f"{OUT}.weight_packed"),
        (with_(f"{OUT}.weight_scale", torch.ones(64, 3)), "wrong-shape", f"{OUT}.weight_scale"),
        (with_(f"{OUT}.weight_scale", torch.ones(64, 2, dtype=torch.int32)), "wrong-dtype", f"{OUT}.weight_scale"),
        (with_(f"{OUT}.weight_g_idx", torch.zeros(64, dtype=torch.int32)), "g-idx", f"{OUT}.weight_g_idx"),
        (with_(f"{KV}.k_scale", torch.ones(1)), "kv-cache-scales", f"{KV}.k_scale"),
    ],
)  # fmt: skip
def test_wrong_files(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], code: str, where: str, tmp_path: Path
) -> None:
    """One error for one cause, where loading has one."""
    write(tmp_path, [group(weights(4, 32, symmetric=False))], change=change)
    found = only(check(tmp_path, *PLUGINS), "error")
    assert (found.code, found.where) == (code, (where,))
    refused(tmp_path)


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    write(tmp_path, W4)
    mend(tmp_path, config_groups={"group_0": group(weights(4, 40))})
    report = check(tmp_path, *PLUGINS)
    findings = report.findings
    assert {finding.code for finding in findings} == {"layer-refused"}
    # Nothing serves them, so the table does not list them.
    assert {row.operation for row in report.rows} == {"embedding", "linear", "attention_prep"}
    assert {row.names for row in report.rows if row.operation == "linear"} == {("model.embed_tokens",)}
    down = next(finding for finding in findings if DOWN in finding.where)
    assert down.where == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    assert down.message == (
        "quantization_config.config_groups.group_0.weights.group_size is 40, which does not divide the 96 "
        "columns of down_proj"
    )
    refused(tmp_path)


def test_zero_points_of_symmetric_weights(tmp_path: Path) -> None:
    write(tmp_path / "packed", [group(weights(4, 32, symmetric=False))])
    mend(tmp_path / "packed", config_groups={"group_0": group(weights(4, 32))})
    found = codes(tmp_path / "packed")["zero-point"]
    assert len(found.where) == 14
    assert "config_groups.group_0.weights.symmetric is true" in found.message
    refused(tmp_path / "packed")
    name = f"{OUT}.weight_zero_point"
    write(
        tmp_path / "zeros",
        [group(weights(8), inputs())],
        change=with_(name, torch.zeros(64, 1, dtype=torch.int8)),
    )
    assert codes(tmp_path / "zeros", "note")["zero-point"].where == (name,)
    make_engine(tmp_path / "zeros", *PLUGINS)


def test_columns_in_an_order(tmp_path: Path) -> None:
    """Stored by config: noted with what it costs."""
    folder = next(folder for folder in FIXTURES if folder.name.endswith("g-idx"))
    notes = {
        finding.code: finding for finding in check(folder, *PLUGINS, dtype="bfloat16", cpu=AVX2).findings
    }
    assert "columns are reordered" in notes["g-idx"].message
    assert "int4pack: g_idx=1 is none of 0" in notes["reference-kernel"].advice
    assert "unfused" in notes


def test_a_group_size_that_only_the_reference_serves(tmp_path: Path) -> None:
    write(tmp_path, [group(weights(4, 16))], intermediate_size=64)
    found = codes(tmp_path, "note")["reference-kernel"]
    assert found.message == "W4A16 g16 sym: only the reference kernel torch serves it, which is slow"
    assert "int4pack: group_size=16 is none of 32, 64, 128, 256" in found.advice
    assert len(found.where) == 14


def test_names_that_match_nothing(tmp_path: Path) -> None:
    write(tmp_path, W4)
    groups = {"group_0": group(weights(4, 32)), "group_1": group(weights(8), None, "Lineer")}
    ignore = ["lm_head", "model.layers.0.self_attn.qkv_proj", "re:.*visual.*"]
    mend(tmp_path, ignore=ignore, config_groups=groups)
    warnings = codes(tmp_path, "warning")
    target, ignored = warnings["target-matches-nothing"], warnings["ignore-matches-nothing"]
    assert target.where == ("quantization_config.config_groups.group_1.targets[0]",)
    assert ignored.where == ("quantization_config.ignore[1]",)
    assert ignored.advice.startswith("name the parts (q_proj, k_proj, v_proj")
    assert codes(tmp_path, "note")["ignore-matches-nothing"].where == ("quantization_config.ignore[2]",)
    assert not codes(tmp_path)
    make_engine(tmp_path, *PLUGINS)


def test_an_ignore_that_hits_too_much(tmp_path: Path) -> None:
    """``re:.*mlp.gate`` is meant for routers and hits gate_proj, for an expression matches from its start."""
    write(tmp_path, W4)
    mend(tmp_path, ignore=["lm_head", "re:.*mlp.gate"])
    errors = codes(tmp_path)
    assert set(errors) == {"quantised-but-ignored"}
    assert errors["quantised-but-ignored"].where == tuple(f"model.layers.{i}.mlp.gate_proj" for i in range(2))
    assert "ignore[1] 're:.*mlp.gate'" in errors["quantised-but-ignored"].message
    refused(tmp_path)


def test_modules_that_no_group_targets(tmp_path: Path) -> None:
    write(tmp_path, W4)
    mend(tmp_path, config_groups={"group_0": group(weights(4, 32), None, "re:.*self_attn.*")})
    errors = codes(tmp_path)
    assert set(errors) == {"quantised-without-group"}
    assert len(errors["quantised-without-group"].where) == 6
    refused(tmp_path)


def test_targeted_and_stored_unquantised(tmp_path: Path) -> None:
    write(tmp_path, W4, ignore=("lm_head", DOWN))
    mend(tmp_path, ignore=["lm_head"])
    assert codes(tmp_path, "note")["targeted-but-plain"].where == (DOWN,)
    make_engine(tmp_path, *PLUGINS)


def test_no_config_at_all(tmp_path: Path) -> None:
    write(tmp_path, W4)
    change_config(tmp_path, quantization_config=...)
    found = only(check(tmp_path, *PLUGINS), "error")
    assert found.code == "no-quantization-config"
    assert len(found.where) == 14
    refused(tmp_path)


def test_every_refused_field_is_named(tmp_path: Path) -> None:
    write(tmp_path, W4)
    groups = {"group_0": group(weights(3, 32)), "group_1": group({**weights(8), "type": "float"})}
    fp8 = {"num_bits": 8, "type": "float"}
    mend(tmp_path, kv_cache_scheme=fp8, sparsity_config={"format": "sparse-24-bitmask"}, config_groups=groups)
    findings = check(tmp_path, *PLUGINS).findings
    assert {finding.where for finding in findings} == {
        ("quantization_config.kv_cache_scheme",),
        ("quantization_config.sparsity_config.format",),
        ("quantization_config.config_groups.group_0.weights.num_bits",),
        ("quantization_config.config_groups.group_1.weights.type",),
    }
    assert {(finding.severity, finding.code) for finding in findings} == {("error", "config-refused")}
    refused(tmp_path)


def test_a_bad_expression(tmp_path: Path) -> None:
    write(tmp_path, W4)
    mend(tmp_path, ignore=["re:("])
    assert "ignore[0] 're:(' is no regular expression" in only(check(tmp_path, *PLUGINS)).message


def test_parts_stored_unlike_are_noted(tmp_path: Path) -> None:
    write(tmp_path, W4, ignore=("lm_head", "re:.*0.*v_proj"))
    found = codes(tmp_path, "note")["unfused"]
    assert found.where == tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")


def test_a_quantised_head_is_read(tmp_path: Path) -> None:
    groups, fields = WEIGHT_ONLY["lm_head"]
    assert fields == EVERYTHING
    write(tmp_path, groups, **fields)
    head = check(tmp_path, *PLUGINS).rows[-2]
    assert (head.names, head.format) == (("lm_head",), "W8A16 channel sym")
