"""Registers the names of the demo models as a model source; imports nothing heavy."""

from __future__ import annotations

from pymllm_core.hookspecs import hookimpl
from pymllm_core.specs import ModelSourceSpec

CONTRACT = "1.0"


@hookimpl
def pymllm_model_sources() -> list[ModelSourceSpec]:
    """One source: the folders inside this package."""
    return [
        ModelSourceSpec(
            name="demo",
            implementation="pymllm_demo.source:resolve",
            priority=40,
            describes="demo, a tiny trained model, and demo-w4a16 and demo-w8a8, the same quantised",
        )
    ]
