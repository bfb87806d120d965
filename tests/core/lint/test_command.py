"""The command `pymllm lint-checkpoint`: output, exit codes, mistakes of a person."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm_core.testing.engines import TOY
from pymllm_core.testing.linting import change_config, change_weights


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pymllm_core", "lint-checkpoint", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(folder: Path) -> None:
    """The architecture is one that no installed plugin has: the report of a checkpoint that will not load."""
    done = run(folder, "--json", "--arch", "8.7")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["counts"] == {"errors": 1, "warnings": 0, "notes": 0}
    assert found["findings"][0]["code"] == "architecture"
    assert found["device"]["capability"] == [8, 7]
    assert not done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["./no/such"], 1, "there is no model './no/such'"),
        ([".", "--arch", "x"], 2, "--arch x is no compute capability"),
        ([".", "--arch", "8.7", "--device", "cpu"], 2, "leave one of them out"),
        ([".", "--bandwidth", "0"], 2, "--bandwidth"),
        ([".", "--bandwith", "1"], 2, "did you mean --bandwidth?"),
    ],
)
def test_mistakes_of_a_person(argv: list[str], code: int, message: str) -> None:
    done = run(*argv)
    assert done.returncode == code
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_missing_points_to_arch() -> None:
    done = run(".", "--device", "cuda")
    assert done.returncode == 2
    assert "--arch 8.7 checks for a device that is not here" in done.stderr


def test_exit_codes_and_strict(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from pymllm_core import cli
    from pymllm_core.commands import lint_checkpoint
    from pymllm_core.testing.engines import registry_of

    monkeypatch.setattr(lint_checkpoint, "registry", lambda: registry_of(TOY))
    argv = ["lint-checkpoint", str(folder), "--server.device", "cpu"]
    assert cli.run(argv) == 0
    assert capsys.readouterr().out.rstrip().endswith("it will load: nothing to remark")
    (folder / "x.safetensors.part").write_bytes(b"")
    assert cli.run(argv) == 0
    assert "it will load: 1 warning" in capsys.readouterr().out
    assert cli.run([*argv, "--strict"]) == 1
    # Names of a stranger's file do not reach the terminal as commands.
    change_weights(folder, lambda tensors: tensors.update({"evil\x1b[2J\n": torch.zeros(1)}))
    change_config(folder, architectures=["MambaForCausalLM"])
    assert cli.run(argv) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "evil\\x1b[2J\\x0a" in out
    assert "error: architectures: model architecture 'MambaForCausalLM' was asked for" in out
    assert out.rstrip().endswith("it will not load: 1 error, 1 warning")
