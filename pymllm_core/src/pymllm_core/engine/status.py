"""What the engine says of itself: how far its start has come, and counters. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pymllm_core.errors import EngineError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start has come: what is being done, and how much of it (bytes, or steps)."""

    stage: str
    done: int = 0
    total: int = 0

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 0.0


ProgressCallback = Callable[[Progress], None]


class Cancelled(EngineError):
    """Loading was told to stop."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and what holds now. Pages kept by the cache count as used.

    prompt_tokens: of all prompts that were read to their end; cache_hit_tokens of them came from the cache.
    last_step_age_s: since the last step, or since work came to an idle engine.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cache_hit_tokens: int = 0
    preemptions: int = 0
    last_step_age_s: float = 0.0
