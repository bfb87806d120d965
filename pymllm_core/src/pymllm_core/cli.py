"""The ``pymllm`` program: sub-commands come from plugins and are imported only when called."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from pymllm_core.errors import ConfigError, PluginError, PymllmError
from pymllm_core.plugins import Registry, registry
from pymllm_core.specs import CommandSpec
from pymllm_core.suggest import suggestion

TRACEBACK_VARIABLE = "PYMLLM_TRACEBACK"
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class PluginGroup(click.Group):
    """Lists the commands from their specs and imports only the one that is called."""

    def __init__(self, found: Registry | None = None, **options: object) -> None:
        super().__init__("pymllm", **options)  # type: ignore[arg-type]
        self._found = found

    @property
    def _registry(self) -> Registry:
        return self._found or registry()

    def _specs(self) -> dict[str, CommandSpec]:
        return {found.spec.name: found.spec for found in self._registry.all(CommandSpec)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._specs())

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        spec = self._specs().get(name)
        if spec is None:
            return None
        for module, requirement in spec.needs.modules.items():
            if not _importable(module):
                raise PluginError(
                    f"the command {name!r} needs the package {requirement}, which is not installed: "
                    f"pip install '{requirement}'"
                )
        command = spec.load()
        if not isinstance(command, click.Command):
            kind = f"a {type(command).__name__}, not a click.Command"
            raise PluginError(f"the command {name!r} ({spec.implementation}) is {kind}")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in self._specs():
            raise click.UsageError(self._unknown(name), ctx)
        return super().resolve_command(ctx, args)

    def _unknown(self, name: str) -> str:
        if owners := self._registry.conflict(CommandSpec, name):
            return f"the command {name!r} is claimed by {' and '.join(owners)}; uninstall one of them"
        message = f"there is no command {name!r}{suggestion(name, self._specs())}"
        failed = [f"  plugin {f.plugin} ({f.distribution}): {f.message}" for f in self._registry.failures]
        if failed:
            message += "\nPlugins that failed, which may matter here:\n" + "\n".join(failed)
        return message

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, spec.help) for name, spec in sorted(self._specs().items())]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
        if count := len(self._registry.failures):
            formatter.write_paragraph()
            formatter.write_text(f"{count} plugin failure(s); see `pymllm plugins`.")


def _importable(module: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from pymllm_core.commands.version import core_version

        click.echo(f"pymllm {core_version()}")
        ctx.exit()


def program(found: Registry | None = None) -> PluginGroup:
    """The command group over a registry, by default over what is installed."""
    version = click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_print_version,
        help="Print it.",
    )
    return PluginGroup(
        found,
        help="Serve, inspect and talk to language models.",
        epilog="Any COMMAND takes --help. PYMLLM_TRACEBACK=1 shows where an error came from.",
        params=[version],
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def run(argv: list[str] | None = None, found: Registry | None = None) -> int:
    """Run the program; returns its exit code. Errors that pymllm knows become one message on stderr."""
    try:
        result = program(found).main(args=argv, prog_name="pymllm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # The reader left (`pymllm plugins | head`): not an error, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except PymllmError as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        click.echo(f"error: {error}", err=True)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR


def main() -> NoReturn:
    """The console script ``pymllm``."""
    sys.exit(run())
