"""``pymllm chat MODEL``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.style import Style

from pymllm_core.commands.base import SettingsCommand, console, is_terminal, settings_of
from pymllm_core.commands.generate import checked, loaded
from pymllm_core.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from pymllm_core.request import SamplingParams

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit or Ctrl-D leaves"
PROMPT = "> "
DIM = Style(dim=True)


class Conversation:
    """The messages so far; the system prompt stays over a reset."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """As the chat template takes them."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with a slash; what to tell the person, None to leave."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return None
        if word == "/reset":
            self.turns.clear()
            return "forgotten"
        if word == "/system":
            self.system = rest.strip() or None
            return "system prompt set" if self.system else "no system prompt"
        return HELP if word == "/help" else f"there is no {word}; {HELP}"


@click.command("chat", cls=SettingsCommand)
@click.argument("model")
@click.option("--system", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy. [default: the model's]")
@click.option("--seed", type=int, help="Repeats the same answers.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
) -> None:
    """Talk to MODEL. Ctrl-C stops an answer, /help lists what else there is."""
    settings = settings_of(ctx, model)
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    out = console()
    with loaded(settings) as llm:
        params = llm.processor.sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        if interactive:
            out.print(f"{settings.server.public_name}. {HELP}", style=DIM)
        converse(llm, Conversation(system), params, read_lines(interactive), out, interactive=interactive)


def read_lines(interactive: bool) -> Iterator[str]:
    """Lines to answer: with editing and history at a terminal, else as they come."""
    if not interactive:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` editing and history
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")


def converse(
    llm: Any,
    conversation: Conversation,
    params: SamplingParams,
    lines: Iterator[str],
    out: Console,
    *,
    interactive: bool,
) -> None:
    """Answer each line until there are no more, or one of them says /exit."""
    for line in lines:
        if not line.strip():
            continue
        if line.startswith("/"):
            said = conversation.command(line.strip())
            if said is None:
                return
            if interactive:
                out.print(said, style=DIM)
            else:
                click.echo(said, err=True)
            continue
        conversation.turns.append({"role": "user", "content": line})
        try:
            content = answer(llm, conversation.messages, params, out)
        except RequestError as error:  # e.g. the conversation outgrew the context
            conversation.turns.pop()
            click.echo(f"error: {error}; /reset starts anew", err=True)
            continue
        conversation.turns.append({"role": "assistant", "content": content})


def answer(llm: Any, messages: list[dict[str, str]], params: SamplingParams, out: Console) -> str:
    """Stream one answer and return its content; reasoning is shown dim and is no part of it.

    Ctrl-C ends the answer, and what was said so far stays in the conversation.
    """
    chat = llm.processor.from_chat(messages, params)
    parser = llm.processor.reasoning_parser(prompt_tail=chat.prompt_tail, thinking=None)
    content: list[str] = []

    def show(kind: str, text: str) -> None:
        if kind == "content":
            content.append(text)
        out.print(text, end="", style=DIM if kind == "reasoning" else None)
        out.file.flush()

    deltas = llm.stream(chat.request)
    try:
        for delta in checked(deltas):
            if parser is None:
                show("content", delta.text)
                continue
            for piece in parser.feed(delta.text):
                show(piece.kind, piece.text)
        for piece in parser.finish() if parser is not None else ():
            show(piece.kind, piece.text)
    except KeyboardInterrupt:
        out.print(" (stopped)", end="", style=DIM)
    finally:
        deltas.close()  # which aborts the request in the engine
    out.print()
    return "".join(content).strip()
