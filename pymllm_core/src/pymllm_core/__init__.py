"""The core of pymllm: contracts, plugin discovery, selection and the engine.

Importing this package imports no torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymllm_core.llm import LLM
    from pymllm_core.output import Completion, Delta
    from pymllm_core.request import Request, SamplingParams

__all__ = ["LLM", "Completion", "Delta", "Request", "SamplingParams"]

_WHERE = {
    "LLM": "pymllm_core.llm",
    "Completion": "pymllm_core.output",
    "Delta": "pymllm_core.output",
    "Request": "pymllm_core.request",
    "SamplingParams": "pymllm_core.request",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
