"""The committed variants of the demo are what `pymllm quantize` makes of it, bit for bit, and are served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pymllm_demo
from pymllm_core import LLM, SamplingParams
from pymllm_core.cli import run

FOLDER = Path(pymllm_demo.__file__).parent
VARIANTS = {"w4a16": "W4A16", "w8a8": "W8A8"}
QUESTION = [{"role": "user", "content": "你好,只回复:ok"}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_command_makes_the_committed_files(variant: str, tmp_path: Path) -> None:
    """All steps of rounding are single float32 operations, which are exact to the bit on every CPU."""
    out, committed = tmp_path / "out", FOLDER / f"model-{variant}"
    assert run(["quantize", "demo", str(out), "--scheme", VARIANTS[variant]]) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in committed.iterdir()}
    for path in out.iterdir():
        kept = committed / path.name
        if path.suffix == ".safetensors":
            found, expected = load_file(path), load_file(kept)
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        elif path.name == "config.json":
            found, expected = (_config(file) for file in (path, kept))
            assert found == expected
        else:
            assert path.read_bytes() == kept.read_bytes()
            assert path.read_bytes() == (FOLDER / "model" / path.name).read_bytes()


def _config(path: Path) -> dict[str, object]:
    """A config.json without what depends on the version of compressed-tensors that wrote it."""
    config: dict[str, dict[str, object]] = json.loads(path.read_text())
    for name in ("version", "moe_sparsity_config"):
        config["quantization_config"].pop(name, None)
    return dict(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_answers(variant: str) -> None:
    with LLM(f"demo-{variant}", device="cpu") as llm:
        assert llm.chat(QUESTION, SamplingParams(max_tokens=8, temperature=0.0)).text == "ok"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_shows_the_scheme(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", f"demo-{variant}", "--server.device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"kernel {variant}_linear" in shown
    assert "compressed-tensors" in shown
