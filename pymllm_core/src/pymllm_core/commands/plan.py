"""``pymllm plan MODEL``: what would serve a model and why, without loading its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pymllm_core.commands.base import (
    SettingsCommand,
    console,
    human_bytes,
    json_option,
    new_table,
    print_json,
    settings_of,
)
from pymllm_core.plugins import registry

if TYPE_CHECKING:
    from rich.console import Console

    from pymllm_core.plan import Plan
    from pymllm_core.select import Choice, Refusal


@click.command("plan", cls=SettingsCommand)
@click.argument("model")
@json_option
@click.pass_context
def command(ctx: click.Context, model: str, as_json: bool) -> None:
    """What would serve MODEL and why: plugins, kernels, memory, limits. Loads no weights."""
    settings = settings_of(ctx, model)
    from pymllm_core.engine.build import make_plan  # brings torch along

    plan = make_plan(settings, registry())
    if as_json:
        print_json(plan.to_json())
    else:
        render(plan, console())


def render(plan: Plan, out: Console) -> None:
    """Print the plan for a person: a table of choices, one of memory, one of limits, then the notes."""
    device = plan.device
    capability = ", compute capability {}.{}".format(*device.capability) if device.capability else ""
    out.print(f"{plan.architecture} from {plan.model_path}", style="bold")
    out.print(f"on {device.type}: {device.name}{capability}; {plan.dtype}, KV in {plan.kv_dtype}\n")
    _render_choices(_choices(plan), out)
    _render_pairs("Memory", _memory(plan), out)
    _render_pairs("Limits", _limits(plan), out)
    for note in plan.notes:
        out.print(f"note: {note}", style="yellow")


def _choices(plan: Plan) -> list[tuple[str, Choice[Any] | None]]:
    rows: list[tuple[str, Choice[Any] | None]] = [
        ("model", plan.model),
        ("quantisation", plan.quant),
        ("attention", plan.attention),
        ("cache", plan.cache),
    ]
    rows += [(f"kernel {name}", choice) for name, choice in plan.kernels.items()]
    rows += [(f"{kind.replace('_', ' ')} parser", choice) for kind, choice in plan.parsers.items()]
    return rows


def _render_choices(rows: list[tuple[str, Choice[Any] | None]], out: Console) -> None:
    table = new_table("For", "Chosen", "Why")
    for what, choice in rows:
        if choice is None:
            table.add_row(what, "none", "")
        else:
            table.add_row(what, f"{choice.spec.name} ({choice.distribution})", choice.why)
    out.print(table)
    if refused := _refused(rows):
        out.print()
        table = new_table("For", "Refused", "Because")
        for what, refusals in refused:
            for number, refusal in enumerate(refusals):
                named = f"{refusal.name} ({refusal.distribution})"
                table.add_row("" if number else what, named, refusal.reason)
        out.print(table)


def _refused(rows: list[tuple[str, Choice[Any] | None]]) -> list[tuple[str, tuple[Refusal, ...]]]:
    """Who was refused for what; shapes of one operation that say the same are said once.

    That another name was asked for is no news to whoever asked; --json has that, too.
    """
    said: dict[tuple[str, tuple[Refusal, ...]], list[str]] = {}
    for what, choice in rows:
        refusals = choice.refused if choice is not None else ()
        telling = tuple(refusal for refusal in refusals if not refusal.reason.endswith("was asked for"))
        if telling:
            kind = " ".join(what.split(" ")[:2]) if what.startswith("kernel ") else what
            said.setdefault((kind, telling), []).append(what)
    return [
        (whats[0] if len(whats) == 1 else f"{kind} ({len(whats)} shapes)", refusals)
        for (kind, refusals), whats in said.items()
    ]


def _render_pairs(title: str, rows: list[tuple[str, str]], out: Console) -> None:
    out.print()
    table = new_table(title, "")
    for name, value in rows:
        table.add_row(name, value)
    out.print(table)


def _memory(plan: Plan) -> list[tuple[str, str]]:
    memory = plan.memory
    tokens = memory.num_pages * memory.page_size
    pages = f"{memory.num_pages} pages of {memory.page_size}"
    each = human_bytes(memory.kv_bytes_per_token)
    kv = f"{human_bytes(memory.kv)}: {tokens} tokens in {pages}, {each} a token"
    return [
        ("free on the device", human_bytes(memory.available)),
        ("budget", human_bytes(memory.budget)),
        ("weights", human_bytes(memory.weights)),
        ("workspace", human_bytes(memory.workspace)),
        *([("CUDA graphs", human_bytes(memory.graphs))] if memory.graphs else []),
        ("KV cache", kv),
        ("left of the budget", human_bytes(memory.left)),
    ]


def _limits(plan: Plan) -> list[tuple[str, str]]:
    limits = plan.limits
    queued = "unlimited" if limits.max_queued_requests is None else str(limits.max_queued_requests)
    return [
        ("context length", f"{limits.context_length} tokens"),
        ("running requests", str(limits.max_running_requests)),
        ("queued requests", queued),
        ("prefill a round", f"{limits.max_prefill_tokens} tokens"),
        ("prefill of one request a round", f"{limits.chunked_prefill_size} tokens"),
        ("KV pool", f"{limits.max_total_tokens} tokens"),
    ]
