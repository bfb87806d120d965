"""What this package registers: the command ``pymllm serve``. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from pymllm_core.hookspecs import hookimpl
from pymllm_core.specs import CommandSpec

CONTRACT = "1.0"


@hookimpl
def pymllm_commands() -> Iterable[CommandSpec]:
    """The server's command."""
    return [
        CommandSpec(
            name="serve",
            implementation="pymllm_server.launch:serve",
            help="Serve MODEL over HTTP (OpenAI-compatible).",
        )
    ]
