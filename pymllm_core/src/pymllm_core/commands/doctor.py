"""``pymllm doctor``: what this machine has, what is missing, and whether the backends really run."""

from __future__ import annotations

import dataclasses
import faulthandler
from collections.abc import Iterable, Iterator

import click

from pymllm_core.commands import checks
from pymllm_core.commands.base import console, json_option, print_json
from pymllm_core.commands.checks import Check
from pymllm_core.plugins import registry

MARKS = {"ok": ("ok", "green"), "info": ("--", "dim"), "warn": ("!!", "yellow"), "fail": ("FAIL", "bold red")}


@click.command("doctor")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Examine the machine and run one small kernel of each backend; exit 1 if something is broken."""
    # A kernel that was built for another CPU ends the process; at least the traceback names it then.
    if not faulthandler.is_enabled():
        faulthandler.enable()
    found = list(all_checks()) if as_json else _render(all_checks())
    failed = [check for check in found if check.status == "fail"]
    if as_json:
        print_json({"healthy": not failed, "checks": [dataclasses.asdict(check) for check in found]})
    if failed:
        ctx.exit(1)


def all_checks() -> Iterator[Check]:
    """Every check, from the machine up to the backends."""
    found = registry()
    yield from checks.system_checks()
    yield from checks.toolchain_checks()
    yield from checks.torch_checks()
    yield from checks.dependency_checks(found)
    yield from checks.plugin_checks(found)
    yield from checks.backend_checks(found)


def _render(found: Iterable[Check]) -> list[Check]:
    """Print each check as soon as it is known, so that one that hangs or crashes is seen."""
    from rich.text import Text

    out = console()
    seen: list[Check] = []
    for check in found:
        if not seen or seen[-1].group != check.group:
            out.print(Text(("\n" if seen else "") + check.group, style="bold"))
        mark, style = MARKS[check.status]
        line = Text.assemble((f"  {mark:<4} ", style), f"{check.name:<18} {check.detail}")
        if check.hint:
            line.append(f"\n{'':7}{'':<18} → {check.hint}", style="yellow")
        out.print(line)
        seen.append(check)
    failed = sum(check.status == "fail" for check in seen)
    warned = sum(check.status == "warn" for check in seen)
    verdict = f"{failed} broken, {warned} could be better" if failed or warned else "all is well"
    out.print(Text(f"\n{verdict}", style="bold red" if failed else "bold"))
    return seen
