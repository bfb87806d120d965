"""The command `pymllm quantize`: its options, what it prints, what it refuses."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from test_quantize import model

from pymllm_core import cli
from pymllm_core.errors import PluginError
from pymllm_core.specs import CommandSpec, Needs
from pymllm_core.testing.engines import registry_of
from pymllm_quant_ct.quantize.scheme import Request

REGISTRY = ("pymllm_quant_ct.plugin", "pymllm_qwen3.plugin")


def command(*arguments: str) -> int:
    return cli.run(["quantize", *arguments], registry_of(*REGISTRY))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(tmp_path / "in")
    given = [str(tmp_path / "in"), str(tmp_path / "out"), "--scheme", "W4A16", "--group-size", "32"]
    assert command(*given, "--asymmetric", "--observer", "mse", "--shard-size", "30kB") == 0
    shown = capsys.readouterr()
    assert not shown.err
    assert shown.out.startswith("W4A16, groups of 32, with zero points, mse: ")
    assert "14 quantised" in shown.out
    assert "in 2 files" in shown.out
    assert "in the mean of all linears" in shown.out
    assert f"pymllm serve {tmp_path / 'out'}" in shown.out
    args = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored = args["config_groups"]["group_0"]["weights"]
    assert (stored["group_size"], stored["symmetric"], stored["observer"]) == (32, False, "mse")
    assert command(*given) == 2
    assert "--overwrite to replace it" in capsys.readouterr().err
    assert command(*given, "--overwrite", "--ignore", "re:.*mlp", "--ignore", "lm_head", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["quantised"], len(found["left"]), found["ignore"]) == (8, 6, ["lm_head", "re:.*mlp"])
    assert found["mean_error"] == pytest.approx(sum(found["errors"].values()) / 8)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--scheme", "W3A16"), 2, "'W3A16' is not one of"),
        ((), 2, "Missing option '--scheme'"),
        (("--scheme", "W4A16", "--group-size", "48"), 2, "'48' is not one of"),
        (("--scheme", "W8A8", "--group-size", "64"), 2, "cannot be had with --scheme W8A8"),
        (("--scheme", "W4A16", "--shard-size", "many"), 2, "'many' is no size such as 4GB"),
        (("--scheme", "W4A16"), 2, "groups of 128 do not divide the 64 columns"),
    ],
)
def test_command_refuses(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(tmp_path / "in", intermediate_size=128)
    assert command(str(tmp_path / "in"), str(tmp_path / "out"), *arguments) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_with_an_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("./nothing", str(tmp_path / "out"), "--scheme", "W8A8") == 1
    assert "there is no model './nothing'" in capsys.readouterr().err


def test_command_without_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_importable", lambda module: module != "compressed_tensors")
    assert command("x", "y", "--scheme", "W8A8") == 1
    assert "pip install 'pymllm-quant-ct[quantize]'" in capsys.readouterr().err


def test_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.4")
    with pytest.raises(
        PluginError, match=r"needs compressed-tensors 0.19 or newer, found 0.9.4: pip install"
    ):
        Request("W8A8").scheme_of_package()


def test_needs_of_the_command() -> None:
    found = {candidate.spec.name: candidate.spec for candidate in registry_of(*REGISTRY).all(CommandSpec)}
    assert found["quantize"].needs == Needs(modules={"compressed_tensors": "pymllm-quant-ct[quantize]"})
