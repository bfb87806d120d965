"""Registers the quantisation method ``compressed-tensors``."""

from __future__ import annotations

from pymllm_core.hookspecs import hookimpl
from pymllm_core.specs import QuantMethodSpec

CONTRACT = "1.0"


@hookimpl
def pymllm_quant_methods() -> list[QuantMethodSpec]:
    return [
        QuantMethodSpec(
            name="compressed-tensors",
            implementation="pymllm_quant_ct.method:CompressedTensors",
            lint="pymllm_quant_ct.lint:lint",
        )
    ]
