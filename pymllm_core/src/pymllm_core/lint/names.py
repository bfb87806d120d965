"""Many names in few words: ``model.layers.{0-27}.mlp.down_proj``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

Indices = tuple[int, ...]
MOST = 6
"""Numbers of one name that are looked at: names come from a stranger's file."""
# Such as are written as they are read: not 007.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


def collapse(names: Iterable[str]) -> list[str]:
    """The names with runs of numbers put together, in order of first appearance. Nothing is left out or added."""
    indices: dict[str, list[Indices]] = defaultdict(list)
    for name in names:
        template: list[str] = []
        numbers: list[int] = []
        for part in name.split("."):
            if len(numbers) < MOST and _NUMBER.fullmatch(part):
                numbers.append(int(part))
                template.append("*")
            else:
                template.append(part.replace("*", "**"))
        indices[".".join(template)].append(tuple(numbers))
    return [
        _fill(template, [ranges(axis) for axis in axes])
        for template, found in indices.items()
        for axes in _boxes(set(found))
    ]


def shorten(names: Iterable[str]) -> list[str]:
    """`collapse`, then names that differ in one of their last two parts put together.

    A part's alternatives are written whole: ``mlp.{gate_proj,up_proj}.weight``.
    """
    found = collapse(names)
    for place in (1, 2):
        alike: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name in found:
            head = name.rsplit(".", place)
            if len(head) <= place:
                alike[name, ""] = []
            else:
                alike[head[0] + ".", "".join(f".{part}" for part in head[2:])].append(head[1])
        found = [before + _choice(options) + after for (before, after), options in alike.items()]
    return found


def _choice(options: list[str]) -> str:
    return "".join(options) if len(options) < 2 else f"{{{','.join(options)}}}"


def ranges(numbers: Iterable[int]) -> str:
    """``{0-27}``, ``{0,2-4}``, or ``5`` for a single number."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(ordered) == 1 else f"{{{text}}}"


def _boxes(found: set[Indices]) -> list[list[list[int]]]:
    """Sets of numbers for each axis, whose products together are exactly `found`."""
    if found == {()}:
        return [[]]
    by_first: dict[int, set[Indices]] = defaultdict(set)
    for first, *rest in found:
        by_first[first].add(tuple(rest))
    by_rest: dict[frozenset[Indices], list[int]] = defaultdict(list)
    for first in sorted(by_first):
        by_rest[frozenset(by_first[first])].append(first)
    return [[firsts, *box] for rest, firsts in by_rest.items() for box in _boxes(set(rest))]


def _fill(template: str, axes: list[str]) -> str:
    values = iter(axes)
    return ".".join(next(values) if part == "*" else part.replace("**", "*") for part in template.split("."))


def printable(text: str) -> str:
    """The text without what a terminal could take for a command: names come from a stranger's file."""
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in text)
