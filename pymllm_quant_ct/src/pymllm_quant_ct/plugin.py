"""Registers the quantisation method ``compressed-tensors`` and the command ``quantize``."""

from __future__ import annotations

from pymllm_core.hookspecs import hookimpl
from pymllm_core.specs import CommandSpec, Needs, QuantMethodSpec

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


@hookimpl
def pymllm_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="quantize",
            implementation="pymllm_quant_ct.quantize.command:command",
            needs=Needs(modules={"compressed_tensors": "pymllm-quant-ct[quantize]"}),
            help="round a model's weights to 4 or 8 bits",
        )
    ]
