"""What ``pymllm bench serve`` sends, and when."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from pymllm_core.bench import workload
from pymllm_core.bench.workload import Ask, Range, arrivals, file_asks, random_asks
from pymllm_core.errors import ConfigError


def test_random_prompts_are_seeded_and_within_their_ranges() -> None:
    asks = random_asks(300, Range(3, 6), Range.parse("2:4"), 150, seed=1)
    assert asks == random_asks(300, Range(3, 6), Range(2, 4), 150, seed=1)
    assert asks != random_asks(300, Range(3, 6), Range(2, 4), 150, seed=2)
    assert {len(ask.body["prompt"]) for ask in asks} == {3, 4, 5, 6}
    assert {ask.body["max_tokens"] for ask in asks} == {2, 3, 4}
    ids = {token for ask in asks for token in ask.body["prompt"]}
    assert (min(ids), max(ids)) == (100, 149)
    with pytest.raises(ConfigError, match="more than 100"):
        random_asks(1, Range(1, 1), Range(1, 1), 100, 0)


@pytest.mark.parametrize("text", ["0", "", "a", "5:4", "0:4", "4:", "1:2:3"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed: a number such as 256"):
        Range.parse(text)


def test_arrivals_are_a_poisson_process() -> None:
    """10,000 exponential gaps: their mean is 1/rate within 4 standard errors, and so is their spread."""
    times = [time for time, _ in zip(arrivals(50.0, 7), range(10_001), strict=False)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times[0] == 0.0
    assert mean == pytest.approx(1 / 50, rel=4 / 10_000**0.5)
    assert spread == pytest.approx(1 / 50, rel=8 / 10_000**0.5)


def test_a_dataset_is_read_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a", "max_tokens": 3}, {"messages": chat}, {"prompt": [5, 6]}]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    asks = file_asks(path, 4, Range(9, 9), 0)
    assert asks == [
        Ask(workload.COMPLETIONS, {"max_tokens": 3, "prompt": "a"}),
        Ask(workload.CHAT, {"max_tokens": 9, "messages": chat}),
        Ask(workload.COMPLETIONS, {"max_tokens": 9, "prompt": [5, 6]}),
        asks[0],
    ]
    for line in ("[]", "{", '{"prompt": "a", "messages": []}', '{"text": "a"}', '{"prompt": "a", "n": 2}'):
        path.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(ConfigError, match=r"asks.jsonl, line 2: "):
            file_asks(path, 1, Range(9, 9), 0)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no line"):
        file_asks(path, 1, Range(9, 9), 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        file_asks(tmp_path / "absent", 1, Range(9, 9), 0)
