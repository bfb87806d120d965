"""``pymllm version``: what is installed, for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform

import click

from pymllm_core.commands.base import json_option, print_json
from pymllm_core.plugins import registry

UNKNOWN = "unknown"


def distribution_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def core_version() -> str:
    """The version of the core; unknown where it runs from a bare source tree."""
    return distribution_version("pymllm-core") or UNKNOWN


def versions() -> dict[str, str | None]:
    """Versions by distribution: the core and its plugins, then torch and Python."""
    found: dict[str, str | None] = {"pymllm-core": core_version()}
    for plugin in registry().distributions:
        found[plugin.name] = plugin.version
    umbrella = distribution_version("pymllm")
    if umbrella is not None:
        found["pymllm"] = umbrella
    return {**found, "torch": distribution_version("torch"), "python": platform.python_version()}


@click.command("version")
@json_option
def command(as_json: bool) -> None:
    """Versions of the pymllm distributions, torch and Python."""
    found = versions()
    if as_json:
        print_json(found)
        return
    width = max(map(len, found))
    for name, version in found.items():
        click.echo(f"{name:<{width}}  {version or 'not installed'}")
