"""Checking a checkpoint with chosen plugins, and changing one to be wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pymllm_core.config import Settings
from pymllm_core.device import describe_cpu
from pymllm_core.lint.device import imagined_device
from pymllm_core.lint.report import Report, lint
from pymllm_core.protocols.lint import Finding
from pymllm_core.testing.engines import TOY, registry_of

WEIGHTS = "model.safetensors"


def check(
    folder: Path, *plugins: str, arch: str | None = None, cpu: Iterable[str] | None = None, **fields: Any
) -> Report:
    """The report on `folder`; the toy model's plugin if nothing else is said.

    arch: an imagined CUDA device. cpu: features of an imagined CPU. fields: of `lint` or settings.
    """
    options = {name: fields.pop(name) for name in ("bandwidth", "weights") if name in fields}
    settings = Settings.of(str(folder), **{"dtype": "auto", **fields})
    device = describe_cpu() if arch is None else imagined_device(arch)
    if cpu is not None:
        device = dataclasses.replace(device, cpu_flags=frozenset(cpu))
    found = registry_of(*(plugins or (TOY,)))
    return lint(settings, folder, device, found, imagined=arch is not None, **options)


def only(report: Report, severity: str | None = None) -> Finding:
    """The one finding of the report (of this severity)."""
    found = [finding for finding in report.findings if severity in (None, finding.severity)]
    assert len(found) == 1, found
    return found[0]


def change_config(folder: Path, **fields: Any) -> None:
    """Set fields of config.json; ... removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a single file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
