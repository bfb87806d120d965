"""What the engine says of itself: how far its start has come, and counters. Free of torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


class StageTimes:
    """Seconds of each stage of a start, told of its progress.

    began: when the start began (`time.monotonic`), None for now; until the first stage it is ``starting``.
    """

    def __init__(self, began: float | None = None) -> None:
        self._began = self._since = time.monotonic() if began is None else began
        self._stage = "starting"
        self.seconds: dict[str, float] = {}

    def __call__(self, progress: Progress) -> None:
        """A stage that comes again goes on counting."""
        if progress.stage != self._stage:
            self._turn(progress.stage)

    def _turn(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def finish(self) -> str:
        """End the last stage: ``4.1 s: starting 0.4, importing torch 1.2, ...``, without what took no time."""
        self._turn("")
        parts = [f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items() if seconds >= 0.05]
        return f"{self._since - self._began:.1f} s: {', '.join(parts)}"


def process_began() -> float | None:
    """When this process was started, on the clock of `time.monotonic`; None where the system does not say.

    Field 22 of /proc/self/stat is in clock ticks since the boot (proc_pid_stat(5)).
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.monotonic() - age if age >= 0 else None


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
