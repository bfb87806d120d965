"""``pymllm bench``: measure one batch in this process, or a running server under load."""

from __future__ import annotations

import click

from pymllm_core.commands.bench_one_batch import one_batch
from pymllm_core.commands.bench_serve import serve


@click.group("bench")
def command() -> None:
    """Measure one batch in this process, or a running server under load."""


command.add_command(one_batch)
command.add_command(serve)
