"""What a load test asks for: prompts of random token ids, or those of a JSONL file; and when it asks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pymllm_core.errors import ConfigError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FIRST_ID = 100
"""Lower ids are often special tokens."""
VOCAB_SIZE = 5000
"""Of servers that do not say theirs: every common vocabulary is larger."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the route and its body, but for what all requests have in common."""

    route: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Range:
    """Lengths from `low` to `high` tokens, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """``256`` or ``100:1024``. Raises ConfigError for anything else."""
        low, colon, high = text.partition(":")
        try:
            found = cls(int(low), int(high if colon else low))
        except ValueError:
            found = cls(0, 0)
        if not 1 <= found.low <= found.high:
            raise ConfigError(
                f"found the length {text!r}, allowed: a number such as 256, or a range 100:1024"
            )
        return found

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


def random_asks(count: int, inputs: Range, outputs: Range, vocab_size: int, seed: int) -> list[Ask]:
    """Prompts of random ids in [`FIRST_ID`, vocab_size), whose answers are exactly as long as they are asked for."""
    if vocab_size <= FIRST_ID:
        raise ConfigError(f"--vocab-size {vocab_size}: allowed: more than {FIRST_ID}")
    numbers = random.Random(seed)
    asks = []
    for _ in range(count):
        length = numbers.randint(inputs.low, inputs.high)
        prompt = [numbers.randrange(FIRST_ID, vocab_size) for _ in range(length)]
        tokens = numbers.randint(outputs.low, outputs.high)
        asks.append(Ask(COMPLETIONS, {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}))
    return asks


def file_asks(path: Path, count: int, outputs: Range, seed: int) -> list[Ask]:
    """`count` requests of a JSONL file, which is begun again where it has fewer lines.

    A line has ``prompt`` (text or token ids) or ``messages`` (a chat), and may have ``max_tokens``. Raises
    ConfigError that names the line at fault.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset {path} cannot be read: {error}") from error
    numbers = random.Random(seed)
    asks = [
        _ask(path, number, line, numbers.randint(outputs.low, outputs.high))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not asks:
        raise ConfigError(f"--dataset {path} holds no line")
    return list(islice(cycle(asks), count))


def _ask(path: Path, number: int, line: str, max_tokens: int) -> Ask:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: no JSON: {error}") from None
    known = {"prompt", "messages", "max_tokens"}
    if not isinstance(found, dict) or len(found.keys() & {"prompt", "messages"}) != 1 or found.keys() - known:
        raise ConfigError(
            f"{path}, line {number}: allowed: an object with prompt or messages, and max_tokens if need be"
        )
    return Ask(CHAT if "messages" in found else COMPLETIONS, {"max_tokens": max_tokens, **found})


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests of a Poisson process of `rate` a second arrive."""
    numbers = random.Random(seed)
    now = 0.0
    while True:
        yield now
        now += numbers.expovariate(rate)
