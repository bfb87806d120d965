"""The flags that the settings have, read off the models, and the command line brought into one form.

The library that parses flags knows neither ``--flag`` alone for a boolean nor ``--flag=value`` beside
``--flag value`` for a list, and cannot suggest; so `normalise` hands it only ``--section.field=VALUE``.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr

from pymllm_core.config import Settings
from pymllm_core.errors import ConfigError
from pymllm_core.suggest import suggestion

CONFIG_FLAG = "--config"
BOOLEANS = {"true": "true", "1": "true", "yes": "true", "on": "true"} | {
    "false": "false", "0": "false", "no": "false", "off": "false"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting as a flag. kind: how its value is read; metavar: what help shows for it."""

    section: str
    field: str
    kind: Literal["bool", "list", "value"]
    metavar: str
    default: str | None
    description: str

    @property
    def name(self) -> str:
        """As it is typed."""
        return f"--{self.section}.{self.field}"


def _kind_and_metavar(annotation: Any) -> tuple[Literal["bool", "list", "value"], str]:
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [arm for arm in get_args(annotation) if arm is not type(None)]
        return _kind_and_metavar(rest[0])
    if get_origin(annotation) is Literal:
        return "value", "{" + ",".join(map(str, get_args(annotation))) + "}"
    if annotation is bool:
        return "bool", "[true|false]"
    if get_origin(annotation) is tuple:
        return "list", "TEXT ..."
    if get_origin(annotation) is dict:
        return "value", "JSON"
    names = {int: "INT", float: "FLOAT", str: "TEXT", SecretStr: "TEXT"}
    return "value", names.get(annotation, "PATH")


def _default(value: Any) -> str | None:
    if value is None or value == () or value == {} or value == "":
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def flags() -> dict[str, Flag]:
    """Every flag by its name, in the order of the settings' fields."""
    found: dict[str, Flag] = {}
    for section, info in Settings.model_fields.items():
        model = typing.cast("type[BaseModel]", info.annotation)
        for field, details in model.model_fields.items():
            kind, metavar = _kind_and_metavar(details.annotation)
            given = None if details.is_required() else details.get_default(call_default_factory=True)
            flag = Flag(section, field, kind, metavar, _default(given), details.description or "")
            found[flag.name] = flag
    return found


def is_settings_flag(token: str) -> bool:
    """Whether the token is (or means to be) a flag of the settings, rather than a command's own."""
    name = token.partition("=")[0]
    sections = tuple(f"--{section}." for section in Settings.model_fields)
    return name.startswith(sections) or name == CONFIG_FLAG


def _canonical(token: str) -> str:
    """The flag with underscores for hyphens."""
    return "--" + token[2:].replace("-", "_")


def partition(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into (the settings' flags with their values, everything else).

    For programs with flags of their own. What follows ``--`` is never a flag.
    """
    settings: list[str] = []
    rest: list[str] = []
    at = 0
    while at < len(argv):
        token = argv[at]
        if token == "--":
            return settings, [*rest, *argv[at:]]
        if not is_settings_flag(token):
            rest.append(token)
            at += 1
            continue
        count = 1 if "=" in token else 1 + _values_after(token, argv[at + 1 :])
        settings += argv[at : at + count]
        at += count
    return settings, rest


def _values_after(token: str, following: Sequence[str]) -> int:
    """How many of the following tokens are values of the flag `token`."""
    flag = flags().get(_canonical(token))
    if flag is not None and flag.kind == "bool":
        return int(bool(following) and following[0].lower() in BOOLEANS)
    until_flag = 0
    while until_flag < len(following) and not following[until_flag].startswith("--"):
        until_flag += 1
    return until_flag if flag is not None and flag.kind == "list" else min(until_flag, 1)


def normalise(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Bring the settings' flags into the form ``--section.field=VALUE``; (those, the value of --config).

    The last of several mentions counts. Raises ConfigError for unknown flags and missing values.
    """
    given: dict[str, str] = {}
    config: str | None = None
    at = 0
    while at < len(argv):
        token, equals, value = argv[at].partition("=")
        at += 1
        if token == CONFIG_FLAG:
            values = [value] if equals else list(argv[at : at + 1])
            at += 0 if equals else 1
            if not values or values[0].startswith("--"):
                raise ConfigError("--config needs the path of a TOML file")
            config = values[0]
            continue
        flag = _flag(token)
        if equals:
            values = [value]
        else:
            count = _values_after(token, argv[at:])
            values = list(argv[at : at + count])
            at += count
            if flag.kind == "bool" and not values and at < len(argv) and not argv[at].startswith("--"):
                values = [argv[at]]  # meant as the value, and about to be refused as one
        given[flag.name] = _joined(flag, values)
    return [f"{name}={value}" for name, value in given.items()], config


def _flag(token: str) -> Flag:
    if not token.startswith("--"):
        raise ConfigError(f"unexpected argument {token!r}; settings are given as --section.field VALUE")
    flag = flags().get(_canonical(token))
    if flag is None:
        nearest = suggestion(_canonical(token), flags())
        raise ConfigError(f"there is no flag {token}{nearest or '; --help lists all flags'}")
    return flag


def _joined(flag: Flag, values: list[str]) -> str:
    if flag.kind == "bool":
        value = values[0] if values else "true"
        if value.lower() not in BOOLEANS:
            allowed = f"{', '.join(BOOLEANS)}, or no value for true"
            raise ConfigError(f"{flag.name}: found {value!r}, allowed: {allowed}")
        return BOOLEANS[value.lower()]
    if not values:
        raise ConfigError(f"{flag.name} needs a value: {flag.metavar}, {flag.description}")
    if flag.metavar == "JSON":
        try:
            json.loads(values[0])
        except ValueError:
            raise ConfigError(f"{flag.name}: found {values[0]!r}, allowed: a JSON object") from None
    if flag.kind == "list" and not values[0].startswith("["):
        return json.dumps([part for value in values for part in value.split(",") if part])
    return values[0]
