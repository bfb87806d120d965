"""Rows of results: one JSON object a line, appended, with what is needed to measure them again."""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymllm_core.commands.version import distribution_version, versions

COMMIT_VARIABLE = "PYMLLM_COMMIT"
_MASK = "***"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def provenance(command: str) -> dict[str, Any]:
    """commit, versions, command and time, for the end of a row."""
    return {
        "commit": source_commit(),
        "versions": {**versions(), "transformers": distribution_version("transformers")},
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command_line(*names: str) -> str:
    """This process's command: `names`, then its arguments as a shell would take them; keys are masked."""
    rest = sys.argv[1:]
    # The historic entry point does not repeat the names of the sub-commands.
    if rest[: len(names) - 1] == list(names[1:]):
        rest = rest[len(names) - 1 :]
    shown, secret = list(names), False
    for token in rest:
        flag, equals, _ = token.partition("=")
        key = flag.startswith("--") and flag.endswith(("api_key", "api-key"))
        shown.append(_MASK if secret else f"{flag}={_MASK}" if key and equals else token)
        secret = key and not equals
    return shlex.join(shown)


@functools.cache
def source_commit() -> str | None:
    """The commit of the source tree that runs, ``-dirty`` where it was changed; None for an installed wheel.

    PYMLLM_COMMIT names it where the tree was copied without its history.
    """
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    folder = Path(__file__).resolve().parent
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    # An environment inside of somebody else's repository is not that repository's commit.
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=12") if tracked else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
