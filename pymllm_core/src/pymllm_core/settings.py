"""Loading the settings: flags, then environment, then a TOML file, then defaults.

pydantic-settings reads the three places; here they are put over one another, so that an error can say
which place the wrong value came from. Nothing of the library is imported before settings are loaded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pymllm_core.config import Settings
from pymllm_core.errors import ConfigError
from pymllm_core.flags import Flag, flags, normalise
from pymllm_core.suggest import suggestion

if TYPE_CHECKING:
    import click
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

ENV_PREFIX = "PYMLLM_"
ENV_DELIMITER = "__"
CONFIG_VARIABLE = "PYMLLM_CONFIG"
HELP_FLAGS = ("-h", "--help")


def load_settings(argv: Sequence[str], *, model: str | None = None) -> Settings:
    """The settings that `argv` (without the program's name), environment and TOML file give.

    model: the model's path where a command takes it as an argument; it goes before --server.model_path.
    Raises ConfigError, whose message names the flag, what was found and what is allowed;
    SystemExit(0) after printing the help that ``-h`` asks for.
    """
    if any(token in HELP_FLAGS for token in argv):
        print(settings_help(), end="")
        raise SystemExit(0)
    flag_argv, config = normalise(argv)
    if model is not None:
        flag_argv.append(f"--server.model_path={model}")
    return _validated(_Sources(flag_argv, config))


def load_settings_or_exit(argv: Sequence[str], *, model: str | None = None) -> Settings:
    """As `load_settings`, but an error is printed to stderr and the program exits with code 2."""
    try:
        return load_settings(argv, model=model)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class _Sources:
    """What each place says, as nested dictionaries of unvalidated values."""

    def __init__(self, flag_argv: Sequence[str], config: str | None) -> None:
        from pydantic import create_model
        from pydantic_settings import (
            BaseSettings,
            CliSettingsSource,
            EnvSettingsSource,
            SettingsConfigDict,
            SettingsError,
        )

        class Base(BaseSettings):
            model_config = SettingsConfigDict(protected_namespaces=())

        fields: dict[str, Any] = {
            name: (info.annotation, info) for name, info in Settings.model_fields.items()
        }
        shape = create_model("SettingsSources", __base__=Base, **fields)
        self.config = config or os.environ.get(CONFIG_VARIABLE) or None
        source = CliSettingsSource[Any](
            shape, cli_parse_args=list(flag_argv), cli_prog_name="pymllm", cli_exit_on_error=False
        )
        self.flags = _plain(source())
        environment = EnvSettingsSource(shape, env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER)
        try:
            self.environment = _plain(environment())
        except SettingsError as error:
            raise ConfigError(_bad_environment() or str(error)) from error
        self.file = _read_toml(self.config) if self.config else {}

    def merged(self) -> dict[str, Any]:
        """The three over one another, flags on top."""
        return _over(_over(self.file, self.environment), self.flags)

    def name(self, loc: Sequence[str | int]) -> str:
        """How the person who wrote the value at `loc` would name it: flag, variable, or file and key."""
        if _at(self.flags, loc):
            return f"--{'.'.join(map(str, loc))}"
        if _at(self.environment, loc):
            return ENV_PREFIX + ENV_DELIMITER.join(str(part).upper() for part in loc)
        if _at(self.file, loc):
            return f"{self.config}: {'.'.join(map(str, loc))}"
        return f"--{'.'.join(map(str, loc))}"


def _bad_environment() -> str | None:
    """The variable that should hold JSON and does not: the library names only the section."""
    variables = {f"{ENV_PREFIX}{name.upper()}": "a JSON object" for name in Settings.model_fields}
    for flag in flags().values():
        if flag.kind == "list" or flag.metavar == "JSON":
            name = f"{ENV_PREFIX}{flag.section}{ENV_DELIMITER}{flag.field}".upper()
            variables[name] = "a JSON object" if flag.metavar == "JSON" else 'a JSON list such as ["a", "b"]'
    for name, allowed in variables.items():
        try:
            json.loads(os.environ.get(name, "{}"))
        except ValueError:
            return f"{name}: found {os.environ[name]!r}, allowed: {allowed}"
    return None


def _plain(found: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(found).items() if value not in (None, {})}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged field by field; a field's own value replaces the one below as a whole."""
    result = dict(below)
    for section, values in above.items():
        under = result.get(section)
        both = isinstance(under, Mapping) and isinstance(values, Mapping)
        result[section] = {**under, **values} if both else values  # type: ignore[dict-item]
    return result


def _at(values: Any, loc: Sequence[str | int]) -> bool:
    for part in loc:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _read_toml(config: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    path = Path(config).expanduser()
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{config} is no valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"the settings file {config} cannot be read: {reason}") from error
    for section in Settings.model_fields:
        if not isinstance(found.get(section, {}), dict):
            raise ConfigError(f"{config}: {section}: found {found[section]!r}, allowed: a table, [{section}]")
    return found


def _validated(sources: _Sources) -> Settings:
    from pydantic import ValidationError

    try:
        return Settings.model_validate(sources.merged())
    except ValidationError as error:
        messages = [_message(details, sources) for details in error.errors(include_url=False)]
        raise ConfigError("\n".join(messages)) from error


def _message(details: ErrorDetails, sources: _Sources) -> str:
    loc = list(details["loc"])
    flag = flags().get(f"--{'.'.join(map(str, loc[:2]))}")
    kind, found = details["type"], details["input"]
    if kind == "missing" and loc in (["server"], ["server", "model_path"]):
        return "no model was named: give --server.model_path (a folder, or a name such as Qwen/Qwen3-0.6B)"
    if kind == "extra_forbidden":
        return _unknown(loc, sources)
    if kind == "value_error":  # a refusal of the settings' own validators, already a sentence
        return details["msg"].removeprefix("Value error, ")
    if flag is None:
        return f"{sources.name(loc)}: found {found!r}; {details['msg']}"
    name = sources.name([flag.section, flag.field])
    shown = "a secret" if flag.field.endswith("api_key") else repr(found)
    return f"{name}: found {shown}, allowed: {_allowed(details, flag)}\n  ({flag.description})"


def _allowed(details: ErrorDetails, flag: Flag) -> str:
    if flag.metavar.startswith("{"):
        return flag.metavar.strip("{}").replace(",", ", ")
    types = {"INT": "a whole number", "FLOAT": "a number", "[true|false]": "true or false", "PATH": "a path"}
    kind = types.get(flag.metavar, details["msg"].lower())
    return f"{kind} {bounds}" if (bounds := " and ".join(_bounds(flag))) else kind


def _bounds(flag: Flag) -> list[str]:
    """All bounds of the field; pydantic reports only the one that was crossed."""
    section = cast("type[BaseModel]", Settings.model_fields[flag.section].annotation)
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    return [
        f"{text} {getattr(rule, key):g}"
        for rule in section.model_fields[flag.field].metadata
        for key, text in words.items()
        if getattr(rule, key, None) is not None
    ]


def _unknown(loc: list[str | int], sources: _Sources) -> str:
    path = ".".join(map(str, loc))
    known = [name[2:] for name in flags()] if len(loc) > 1 else list(Settings.model_fields)
    return f"{sources.name(loc)}: there is no such setting{suggestion(path, known)}"


def settings_help() -> str:
    """Every flag by section with its default and description, as wide as the terminal."""
    import click

    formatter = click.HelpFormatter(max_width=100)
    formatter.write_usage("", "--server.model_path MODEL [--section.field VALUE] ...", prefix="Usage:")
    write_settings_help(formatter)
    return formatter.getvalue()


def write_settings_help(formatter: click.HelpFormatter) -> None:
    """Write the flags into the help of a command that takes settings."""
    by_section: dict[str, list[tuple[str, str]]] = {}
    for flag in flags().values():
        default = f" [default: {flag.default}]" if flag.default is not None else ""
        row = (f"{flag.name} {flag.metavar}", f"{flag.description}{default}")
        by_section.setdefault(flag.section, []).append(row)
    for section, rows in by_section.items():
        with formatter.section(f"Settings, --{section}.*"):
            formatter.write_dl(rows, col_max=44)
    with formatter.section("More settings"):
        formatter.write_dl(
            [
                ("--config FILE", f"TOML file with [server] and [quantization] (or {CONFIG_VARIABLE})"),
                (f"{ENV_PREFIX}SECTION{ENV_DELIMITER}FIELD", "environment, e.g. PYMLLM_SERVER__PORT=8000"),
            ]
        )
    formatter.write_paragraph()
    formatter.write_text("Flags go before environment, environment before file, file before defaults.")
