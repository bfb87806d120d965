"""What commands share: taking the settings' flags beside their own, and writing for people and scripts."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

    from pymllm_core.config import Settings
    from pymllm_core.engine.status import Progress as Status
    from pymllm_core.engine.status import ProgressCallback

_META = "pymllm_core.settings_argv"


class SettingsCommand(click.Command):
    """A command that takes every flag of the settings besides its own options.

    The settings' flags are split off before click parses, so they may stand anywhere;
    `settings_of` turns them into settings.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from pymllm_core.flags import flags, partition
        from pymllm_core.suggest import suggestion

        ctx.meta[_META], rest = partition(args)
        try:
            return super().parse_args(ctx, rest)
        except click.NoSuchOption as error:
            own = [name for parameter in self.params for name in parameter.opts if name.startswith("--")]
            nearest = suggestion(error.option_name.replace("-", "_").replace("__", "--", 1), flags())
            nearest = nearest or suggestion(error.option_name, own)
            raise click.UsageError(f"there is no option {error.option_name}{nearest}", ctx) from None

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[--section.field VALUE] ..."]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from pymllm_core.settings import write_settings_help

        super().format_options(ctx, formatter)
        write_settings_help(formatter)


def settings_of(ctx: click.Context, model: str | None = None) -> Settings:
    """The settings that the command line, environment and TOML file give to this call."""
    from pymllm_core.settings import load_settings

    argv: Sequence[str] = ctx.meta.get(_META, ())
    return load_settings(argv, model=model)


def spread(args: Sequence[str], patterns: Mapping[str, re.Pattern[str]]) -> list[str]:
    """``--size 1 8`` as ``--size 1 --size 8``, for click, whose options take a fixed number of values.

    patterns: by option, what its values look like; the first argument that does not ends them.
    """
    result: list[str] = []
    option: str | None = None
    first = False
    for token in args:
        if token in patterns:
            option, first = token, True
            result.append(token)
        elif option is not None and patterns[option].fullmatch(token):
            result += [token] if first else [option, token]
            first = False
        else:
            option = None
            result.append(token)
    return result


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at the stream."""
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def console(stream: TextIO | None = None) -> Console:
    """A rich console that is plain, and never cuts a line, where nobody looks at it."""
    from rich.console import Console

    stream = stream or sys.stdout
    terminal = is_terminal(stream)
    # Rich honours NO_COLOR by keeping bold and dim; plain means plain.
    plain = not terminal or bool(os.environ.get("NO_COLOR"))
    return Console(
        file=stream,
        no_color=plain,
        color_system=None if plain else "auto",
        force_terminal=terminal,
        width=None if terminal else 160,
        highlight=False,
        emoji=False,
        markup=False,
        soft_wrap=not terminal,
    )


def new_table(*headers: str) -> Any:
    """An empty table in the style of all commands."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        # Reasons wrap; names must stay whole to be copied.
        table.add_column(header, overflow="fold")
    return table


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressCallback | None]:
    """A bar on stderr that goes away at the end; None where nobody looks at it."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def show(news: Status) -> None:
            bar.update(task, description=news.stage, completed=news.done, total=news.total or None)

        yield show


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def human_bytes(count: float) -> str:
    """Bytes with a unit, e.g. ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


json_option: Callable[..., Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for scripts."
)
