"""Write docs/reference/settings.md and hooks.md from the code that they describe.

`python docs/generate_reference.py` writes them; a test fails where they differ from the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pymllm_core import hookspecs
from pymllm_core.config import Settings
from pymllm_core.flags import Flag, flags
from pymllm_core.hookspecs import HOOKS
from pymllm_core.plugins import ENTRY_POINT_GROUP, RESTRICT_VARIABLE
from pymllm_core.settings import CONFIG_VARIABLE, ENV_DELIMITER, ENV_PREFIX
from pymllm_core.specs import CONTRACT, Needs, ShapeRule, Spec, Want

FOLDER = Path(__file__).resolve().parent / "reference"
GENERATED = "<!-- Written by docs/generate_reference.py; change the code, then run it. -->\n"
SETTINGS_INTRODUCTION = f"""\
Every setting can be given as a flag, as an environment variable or in a TOML file. Where several are given,
flags win over the environment, the environment over the file, the file over the default.

- Flag: `--server.port 8000` or `--server.port=8000`. A boolean may stand alone:
  `--server.disable_radix_cache`.
- Environment: `{ENV_PREFIX}SERVER{ENV_DELIMITER}PORT=8000`.
- File: `--config FILE`, or its path in `{CONFIG_VARIABLE}`; one table a section, `[server]` and
  `[quantization]`.

A setting works, or is refused with the reason, or, where it concerns nothing in this model or on this machine,
is named in the plan's notes."""
HOOKS_INTRODUCTION = f"""\
A plugin is a module named by an entry point of the group `{ENTRY_POINT_GROUP}`. It declares
`CONTRACT = "{CONTRACT}"`, the version of this contract that it was written for (another major version is
refused), and implements any of the hooks below, each marked with `pymllm_core.hookspecs.hookimpl`. A hook
returns specs: frozen descriptions whose `implementation` is a `"module:attribute"` string, imported only
if the spec was chosen. Plugin modules import neither torch nor anything else that is heavy.

A plugin that raises, returns something else, or implements a hook that does not exist is recorded as a
failure under its name; the others go on. Two plugins that claim one name both lose it, and the failure
names both. `pymllm plugins` shows all of this. `{RESTRICT_VARIABLE}` restricts discovery to the plugins
that it names (entry points or distributions, separated by commas); the core is always there.
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _code(text: str) -> str:
    """Text as inline code in a table's cell."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def _prose(text: str | None) -> str:
    """A docstring as Markdown: double backquotes become single ones."""
    return inspect.cleandoc(text or "").replace("``", "`")


def _values(flag: Flag) -> str:
    section: Any = Settings.model_fields[flag.section].annotation
    rules = section.model_fields[flag.field].metadata
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in rules
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    kind = flag.metavar.strip("{}[]")
    words = {"INT": "integer", "FLOAT": "number", "TEXT": "text", "PATH": "path", "JSON": "JSON object"}
    if flag.metavar.startswith(("{", "[")):
        return ", ".join(_code(value) for value in re.split(r"[,|]", kind))
    return ", ".join([words.get(kind, "text, repeatable" if flag.kind == "list" else kind), *bounds])


def settings() -> str:
    """The page of all settings."""
    lines = ["# Settings", "", GENERATED, SETTINGS_INTRODUCTION]
    section = ""
    for flag in flags().values():
        if flag.section != section:
            section = flag.section
            lines += ["", f"## {section}", "", "| Flag | Values | Default | Meaning |", "|---|---|---|---|"]
        default = _code(flag.default or "")
        lines.append(f"| `{flag.name}` | {_values(flag)} | {default} | {flag.description} |")
    return "\n".join(lines) + "\n"


def _fields(kind: type[Any]) -> list[str]:
    lines = ["| Field | Type | Default |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            default = _code(repr(field.default))
        elif field.default_factory is not dataclasses.MISSING:
            default = _code(repr(field.default_factory()))
        else:
            default = "required"
        lines.append(f"| `{field.name}` | {_code(str(field.type))} | {default} |")
    return lines


def _hook(name: str, kind: type[Spec]) -> list[str]:
    function: Callable[..., Any] = getattr(hookspecs, name)
    signature = str(inspect.signature(function)).replace("'", "")
    common = {field.name for field in dataclasses.fields(Spec)}
    own = {field.name for field in dataclasses.fields(kind)} - common
    lines = [f"## `{name}`", "", _prose(function.__doc__), "", "```python", "@hookimpl"]
    lines += [f"def {name}{signature}: ...", "```", "", f"**`{kind.__name__}`**: {_prose(kind.__doc__)}"]
    if own:
        lines += ["", "Beside the fields of every spec:", "", *_fields(kind)[:2]]
        lines += [row for row in _fields(kind)[2:] if row.split("`")[1] in own]
    return [*lines, ""]


def hooks() -> str:
    """The page of all hooks."""
    lines = ["# Hooks", "", GENERATED, HOOKS_INTRODUCTION]
    for name, kind in HOOKS.items():
        lines += _hook(name, kind)
    for base in (Spec, Needs, ShapeRule, Want):
        title = "Fields of every spec" if base is Spec else f"`{base.__name__}`"
        lines += [f"## {title}", "", _prose(base.__doc__), "", *_fields(base), ""]
    return "\n".join(lines).rstrip() + "\n"


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings, "hooks.md": hooks}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
