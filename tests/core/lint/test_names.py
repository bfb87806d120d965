"""Names in few words: nothing is lost, nothing is added."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymllm_core.lint.names import collapse, printable, ranges, shorten


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], ["a.{0-2}.b"]),
        (["a.2", "a.0", "a.5", "a.3"], ["a.{0,2-3,5}"]),
        (["a.0.x.0", "a.0.x.1", "a.1.x.0", "a.1.x.1"], ["a.{0-1}.x.{0-1}"]),
        (["a.0.x.0", "a.1.x.0", "a.1.x.1"], ["a.0.x.0", "a.1.x.{0-1}"]),
        (["lm_head", "a.7"], ["lm_head", "a.7"]),
        (["a.007", "a.*.1", "a..1", "٣.1"], ["a.007", "a.*.1", "a..1", "٣.1"]),
        (["a.0", "a.0"], ["a.0"]),
    ],
)
def test_collapse(names: list[str], short: list[str]) -> None:
    assert collapse(names) == short


def test_shorten() -> None:
    names = [f"m.{i}.mlp.{part}.{kind}" for i in range(3) for part in ("gate", "up") for kind in ("w", "s")]
    assert shorten([*names, "lm_head"]) == ["m.{0-2}.mlp.{gate,up}.{w,s}", "lm_head"]


def expand(short: str) -> list[str]:
    """What a shortened name stands for."""
    axes = []
    for part in re.split(r"(\{[^}]*\})", short):
        if not part.startswith("{"):
            axes.append([part])
            continue
        numbers: list[str] = []
        for run in part[1:-1].split(","):
            first, _, last = run.partition("-")
            numbers += map(str, range(int(first), int(last or first) + 1))
        axes.append(numbers)
    return ["".join(parts) for parts in itertools.product(*axes)]


PARTS = st.sampled_from(["0", "1", "2", "3", "10", "00", "a", "*", "**", ""])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=12))
def test_nothing_is_lost_or_added(names: list[str]) -> None:
    found = [name for short in collapse(names) for name in expand(short)]
    assert sorted(found) == sorted(set(names))


def test_hostile_names() -> None:
    assert collapse([".".join(["1"] * 5000)]) == [".".join(["1"] * 5000)]
    assert collapse(["9" * 5000]) == ["9" * 5000]
    assert printable("a\x1b[0m\nü") == "a\\x1b[0m\\x0aü"
    assert ranges([3]) == "3"
