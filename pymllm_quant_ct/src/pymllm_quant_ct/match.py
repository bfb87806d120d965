"""Which group of a config a module belongs to: by name, by regular expression, by class.

Rules of compressed-tensors (``utils/match.py``): a name is equal or, after ``re:``, matched from its start;
an exact name goes before a regular expression, and that before a class. Names are the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pymllm_core.errors import CheckpointError
from pymllm_quant_ct.config import ROOT, Config, Group

REGEX = "re:"
_MOVED = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model.model."),
)
"""Qwen3-VL's modules are named either way, depending on the version of transformers that wrote the config."""
_CLASSES = {
    "Linear": ("Linear", "LinearBase", "Module"),
    "Router": ("Linear", "LinearBase", "Module"),
    "Embedding": ("Embedding", "Module"),
}


class Matcher:
    """Compiles a config's names once. Raises CheckpointError naming a regular expression that is none."""

    def __init__(self, config: Config) -> None:
        self._ignore = [_compile(name, f"ignore[{i}]") for i, name in enumerate(config.ignore)]
        self._targets = [
            (_compile(name, f"{group.field}.targets[{i}]"), group)
            for group in config.groups
            for i, name in enumerate(group.targets)
        ]

    def group(self, name: str, module: str) -> Group | None:
        """The group of the module `name` of class `module`; None where it is ignored or not targeted."""
        names = list(_aliases(name))
        if any(_rank(pattern, names, module) is not None for pattern in self._ignore):
            return None
        ranked = [
            (rank, index)
            for index, (pattern, _) in enumerate(self._targets)
            if (rank := _rank(pattern, names, module)) is not None
        ]
        return self._targets[min(ranked)[1]][1] if ranked else None


def _compile(name: str, field: str) -> str | re.Pattern[str]:
    if not name.startswith(REGEX):
        return name
    try:
        return re.compile(name.removeprefix(REGEX))
    except re.error as error:
        raise CheckpointError(f"{ROOT}.{field} {name!r} is no regular expression: {error}") from error


def _rank(pattern: str | re.Pattern[str], names: list[str], module: str) -> int | None:
    """0 for an equal name, 1 for a regular expression, 2 for a class, None for no match."""
    if isinstance(pattern, str):
        if pattern in names:
            return 0
        return 2 if pattern in _CLASSES[module] else None
    return 1 if any(pattern.match(name) for name in names) else None


def _aliases(name: str) -> Iterator[str]:
    yield name
    for one, other in _MOVED:
        if name.startswith(one):
            yield other + name.removeprefix(one)
        elif name.startswith(other):
            yield one + name.removeprefix(other)
