"""``pymllm generate MODEL PROMPT``: one answer, streamed to stdout."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from pymllm_core.commands.base import (
    SettingsCommand,
    is_terminal,
    json_option,
    print_json,
    progress_bar,
    settings_of,
)
from pymllm_core.errors import EngineError

if TYPE_CHECKING:
    from pymllm_core.config import Settings
    from pymllm_core.output import Delta


@contextmanager
def loaded(settings: Settings) -> Iterator[Any]:
    """The model, loaded; while it loads, a person sees how far it is."""
    with progress_bar(f"starting {settings.server.model_path}") as progress:
        from pymllm_core import LLM  # brings torch along

        llm = LLM.from_settings(settings, progress=progress)
    with llm:
        yield llm


def checked(deltas: Iterator[Delta]) -> Iterator[Delta]:
    """The deltas again. Raises EngineError where one reports an error."""
    for delta in deltas:
        yield delta
        if delta.finish_reason == "error":
            raise EngineError(delta.error or "the engine ended the request with an error")


@click.command("generate", cls=SettingsCommand)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy. [default: the model's]")
@click.option("--seed", type=int, help="Repeats the same answer.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    prompt: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    raw: bool,
    as_json: bool,
) -> None:
    """Answer PROMPT (or standard input, for - or none) with MODEL."""
    settings = settings_of(ctx, model)
    text = _prompt(ctx, prompt)
    with loaded(settings) as llm:
        params = llm.processor.sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        if raw:
            deltas = llm.generate(text, params, stream=True)
        else:
            deltas = llm.chat([{"role": "user", "content": text}], params, stream=True)
        if as_json:
            print_json(_as_json(settings, list(checked(deltas))))
            return
        for delta in checked(deltas):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        sys.stdout.write("\n")


def _prompt(ctx: click.Context, prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and is_terminal(sys.stdin):
        raise click.UsageError("no prompt was given; give it as an argument or on standard input", ctx)
    text = sys.stdin.read()
    if not text:
        raise click.UsageError("standard input was empty, so there is no prompt", ctx)
    return text.removesuffix("\n")


def _as_json(settings: Settings, deltas: list[Delta]) -> dict[str, Any]:
    last = deltas[-1]
    return {
        "model": settings.server.public_name,
        "text": "".join(delta.text for delta in deltas),
        "token_ids": [token for delta in deltas for token in delta.token_ids],
        "finish_reason": last.finish_reason,
        "usage": last.usage._asdict(),
        "timings": dataclasses.asdict(last.timings) if last.timings else None,
    }
