"""Which group of a config a module belongs to: by name, by regular expression, by class.

Rules of compressed-tensors (``utils/match.py``): a name is equal or, after ``re:``, matched from its start;
an exact name goes before a regular expression, and that before a class. Names are the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of ``ignore`` or of a group's ``targets``. field: where in the config it stands."""

    field: str
    text: str
    pattern: re.Pattern[str] | None

    @classmethod
    def read(cls, text: str, field: str) -> Entry:
        """Raises CheckpointError for a regular expression that is none."""
        if not text.startswith(REGEX):
            return cls(field, text, None)
        try:
            return cls(field, text, re.compile(text.removeprefix(REGEX)))
        except re.error as error:
            raise CheckpointError(f"{ROOT}.{field} {text!r} is no regular expression: {error}") from error

    def rank(self, names: list[str], module: str) -> int | None:
        """0 for an equal name, 1 for a regular expression, 2 for a class, None for no match."""
        if self.pattern is None:
            if self.text in names:
                return 0
            return 2 if self.text in _CLASSES[module] else None
        return 1 if any(self.pattern.match(name) for name in names) else None


class Matcher:
    """Compiles a config's names once. Raises CheckpointError naming a regular expression that is none."""

    def __init__(self, config: Config) -> None:
        self.ignore = [Entry.read(name, f"ignore[{i}]") for i, name in enumerate(config.ignore)]
        self._targets = [
            (Entry.read(name, f"{group.field}.targets[{i}]"), group)
            for group in config.groups
            for i, name in enumerate(group.targets)
        ]

    @property
    def targets(self) -> list[Entry]:
        """The targets of all groups."""
        return [entry for entry, _ in self._targets]

    def ignored_by(self, name: str, module: str) -> Entry | None:
        """The entry of ``ignore`` that leaves the module `name` out."""
        names = list(aliases(name))
        return next((entry for entry in self.ignore if entry.rank(names, module) is not None), None)

    def group(self, name: str, module: str) -> Group | None:
        """The group of the module `name` of class `module`; None where it is ignored or not targeted."""
        if self.ignored_by(name, module) is not None:
            return None
        names = list(aliases(name))
        ranked = [
            (rank, index)
            for index, (entry, _) in enumerate(self._targets)
            if (rank := entry.rank(names, module)) is not None
        ]
        return self._targets[min(ranked)[1]][1] if ranked else None


def aliases(name: str) -> Iterator[str]:
    """The name, and what the module is called by the other version of transformers."""
    yield name
    for one, other in _MOVED:
        if name.startswith(one):
            yield other + name.removeprefix(one)
        elif name.startswith(other):
            yield one + name.removeprefix(other)
