"""Contract of what a quantisation method can say of a checkpoint from its config and headers. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
"""error: it will not load. warning: it loads, and is likely to be wrong. note: worth knowing."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file's header describes it. dtype: the safetensors name, e.g. ``BF16``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding about a checkpoint.

    code: its kind, for scripts. where: the tensors, modules, files or config fields that it is about.
    message: what was found. advice: what to do.
    """

    severity: Severity
    code: str
    where: tuple[str, ...]
    message: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class LintInput:
    """What is known of a checkpoint without its data.

    config: config.json. quantization: its ``quantization_config``, None where that is missing or another
    method's. tensors: all headers. modules: the linears and embeddings that the model's graph reads, with
    their class (``Linear``, ``Embedding``); empty where there is no graph, e.g. for an unknown architecture.
    """

    config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    tensors: Mapping[str, StoredTensor]
    modules: Mapping[str, str]


QuantLint = Callable[[LintInput], Iterable[Finding]]
"""A method's own knowledge of trouble; see `specs.QuantMethodSpec.lint`.

The core finds by itself what loading would refuse of the modules in `LintInput.modules`: missing and unused
tensors, shapes, dtypes. An error whose `Finding.where` names such a tensor or its module replaces the core's.
"""
