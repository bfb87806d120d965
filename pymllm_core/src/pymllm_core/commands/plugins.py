"""``pymllm plugins``: what was discovered, and everything that went wrong while discovering it."""

from __future__ import annotations

from typing import Any

import click

from pymllm_core.commands.base import console, json_option, print_json
from pymllm_core.hookspecs import HOOKS
from pymllm_core.plugins import Failure, Registry, registry
from pymllm_core.specs import CONTRACT, Spec


def spec_to_json(spec: Spec) -> dict[str, Any]:
    """A spec as plain data, without what it leaves empty."""
    needs = {
        "devices": list(spec.needs.devices),
        "capability_min": spec.needs.capability_min,
        "capability_max": spec.needs.capability_max,
        "cpu_flags": list(spec.needs.cpu_flags),
        "dtypes": list(spec.needs.dtypes),
        "modules": dict(spec.needs.modules),
        "shape": sorted(spec.needs.shape),
        "check": spec.needs.check,
    }
    return {
        "name": spec.key,
        "implementation": spec.implementation,
        "priority": spec.priority,
        "needs": {key: value for key, value in needs.items() if value},
    }


def registry_to_json(found: Registry) -> dict[str, Any]:
    """The registry as plain data: each distribution with its hooks and specs, and the failures."""
    return {
        "contract": CONTRACT,
        "plugins": [
            {
                "plugin": plugin.plugin,
                "distribution": plugin.name,
                "version": plugin.version,
                "hooks": {
                    hook: [
                        spec_to_json(entry.spec)
                        for entry in found.specs.get(hook, ())
                        if entry.distribution == plugin.name
                    ]
                    for hook in plugin.hooks
                },
            }
            for plugin in found.distributions
        ],
        "failures": [
            {
                "plugin": failure.plugin,
                "distribution": failure.distribution,
                "hook": failure.hook,
                "message": failure.message,
            }
            for failure in found.failures
        ],
    }


def failure_line(failure: Failure) -> str:
    """One failure as a sentence that names plugin, distribution and hook."""
    hook = f", hook {failure.hook}" if failure.hook else ""
    return f"{failure.plugin} ({failure.distribution}{hook}): {failure.message}"


def _needs(spec: Spec) -> str:
    """The most telling requirements in a few words."""
    words = list(spec.needs.devices)
    if spec.needs.capability_min:
        words.append("sm{}{}+".format(*spec.needs.capability_min))
    words += spec.needs.cpu_flags
    words += spec.needs.modules.values()
    return f" ({', '.join(words)})" if words else ""


@click.command("plugins")
@json_option
@click.option("--strict", is_flag=True, help="Exit with 1 if any plugin failed.")
@click.pass_context
def command(ctx: click.Context, as_json: bool, strict: bool) -> None:
    """Installed plugins, what each registers, and what failed."""
    found = registry()
    if as_json:
        print_json(registry_to_json(found))
    else:
        _render(found)
    if strict and found.failures:
        ctx.exit(1)


def _render(found: Registry) -> None:
    out = console()
    for plugin in found.distributions:
        out.print(f"{plugin.name} {plugin.version}", style="bold")
        for hook in HOOKS:
            entries = [e for e in found.specs.get(hook, ()) if e.distribution == plugin.name]
            if entries:
                kind = hook.removeprefix("pymllm_").replace("_", " ")
                listed = ", ".join(entry.spec.key + _needs(entry.spec) for entry in entries)
                out.print(f"  {kind}: {listed}")
    if found.failures:
        out.print(f"\n{len(found.failures)} failure(s)", style="bold red")
        for failure in found.failures:
            out.print(f"  {failure_line(failure)}", style="red")
